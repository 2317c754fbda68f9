"""Floating-point operations of training, for MFU: matmuls only, forward + backward (backward counted twice forward).

Per token, with L layers, C channels, H heads, G key-value heads, D head dim, F inner size, V vocabulary, and s tokens a
sequence:

    matmul parameters   N = L (C (H + 2 G) D + H D C + m C F) + C V       m = 3 for swiglu, else 2
    matmul              6 N
    attention, full     12 L H D k                                        k = min(window + 1, s) keys for each query
    attention, causal   12 L H D (k - k^2 / 2s)                           without a window half of it

Megatron-LM's code and llm.c count the causal half; torchtitan, nanoGPT and PaLM (arXiv 2204.02311) count in full.
"""

from __future__ import annotations

from megakern.config import GPTConfig, require


def matmul_parameters(config: GPTConfig) -> int:
    """N of the module's table: weights that a token is multiplied with; biases, norms and embeddings do not count."""
    qkv = config.width * (config.heads + 2 * config.key_value_heads) * config.size_of_head
    proj = config.heads * config.size_of_head * config.width
    mlp = (3 if config.activation == "swiglu" else 2) * config.width * config.size_of_ffn
    return config.layers * (qkv + proj + mlp) + config.width * config.vocab_size


def attention_flops_per_token(config: GPTConfig, sequence_length: int | None = None, *, causal: bool) -> float:
    """FLOPs a token of Q K^T and P V, forward + backward: where the mask lets a query see a key, or without a mask.

    A window counts in both. Raises ConfigError when `sequence_length` (None: the model's longest) is below 1.
    """
    s = config.sequence_length if sequence_length is None else sequence_length
    require(s >= 1, f"sequence_length must be 1 or more, got {s}")
    keys = s if config.window is None else min(config.window + 1, s)
    seen = keys - keys**2 / (2 * s) if causal else keys
    return 12 * config.layers * config.heads * config.size_of_head * seen


def flops_per_token(config: GPTConfig, sequence_length: int | None = None, *, causal: bool) -> float:
    """FLOPs a token of training on sequences of `sequence_length` tokens (None: the model's longest).

    causal: count attention where the mask lets a query see a key, else in full. Raises ConfigError for length 0.
    """
    return 6 * matmul_parameters(config) + attention_flops_per_token(config, sequence_length, causal=causal)
