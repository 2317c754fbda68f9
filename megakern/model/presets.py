"""Named model shapes, `mk.presets["gpt2-124m"]`: published sizes, and small ones for tests and demonstrations.

Dropout is 0 in all of them; set it with `dataclasses.replace` or `--model.dropout`.
"""

from __future__ import annotations

import difflib

from megakern.config import ConfigError, GPTConfig


def _gpt2(layers: int, width: int, heads: int, **other) -> GPTConfig:
    """GPT-2 (Radford et al. 2019): learned positions, tanh GELU, biases everywhere, tied head."""
    return GPTConfig(**{"layers": layers, "width": width, "heads": heads, "activation": "gelu_tanh", **other})


def _llama(layers: int, width: int, heads: int, kv_heads: int, ffn_size: int, **other) -> GPTConfig:
    """The Llama family: RMSNorm, SwiGLU, rope, grouped queries, no biases."""
    shape = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn_size": ffn_size}
    family = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "bias": False}
    return GPTConfig(**{**shape, **family, **other})


def _llama3(*shape: int) -> GPTConfig:
    """Llama 3 (arXiv 2407.21783, table 3)."""
    return _llama(*shape, vocab_size=128256, sequence_length=8192, rope_base=500000.0, tied_embeddings=False)


def _qwen3(*shape: int, tied: bool) -> GPTConfig:
    """Qwen3 (arXiv 2505.09388, table 1): heads of 128 whatever the width, each query and key head normed."""
    special = {"head_dim": 128, "qk_norm": True, "norm_eps": 1e-6, "rope_base": 1000000.0}
    return _llama(*shape, vocab_size=151936, sequence_length=40960, tied_embeddings=tied, **special)


class Presets(dict):
    """Name -> `GPTConfig`. An unknown name raises ConfigError with the nearest known one."""

    def __missing__(self, name: str) -> GPTConfig:
        near = difflib.get_close_matches(str(name), self, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"unknown preset {name!r}{hint} the presets are {', '.join(self)}")


presets = Presets(
    {
        "tiny-gpt2": _gpt2(2, 64, 4, vocab_size=250, sequence_length=64),
        "tiny-llama": _llama(2, 64, 4, 2, 128, vocab_size=250, sequence_length=64, tied_embeddings=False),
        # Wide and shallow: of the shapes tried at this size it loses least time to collectives and learns as much a
        # token. init_std is about 1 / sqrt(width), which such a small width wants.
        "demo": GPTConfig(
            layers=2,
            width=512,
            heads=8,
            vocab_size=4096,
            sequence_length=256,
            norm="rmsnorm",
            activation="relu_squared",
            positions="rope",
            bias=False,
            qk_norm=True,
            tied_embeddings=False,
            init_std=0.05,
        ),
        "gpt2-124m": _gpt2(12, 768, 12),
        "gpt2-355m": _gpt2(24, 1024, 16),
        "gpt2-774m": _gpt2(36, 1280, 20),
        "gpt2-1.5b": _gpt2(48, 1600, 25),
        # Megatron-LM (arXiv 1909.08053, table 1), with GPT-2's vocabulary.
        "megatron-1.2b": _gpt2(40, 1536, 16),
        "megatron-2.5b": _gpt2(54, 1920, 20),
        "megatron-4.2b": _gpt2(64, 2304, 24),
        "megatron-8.3b": _gpt2(72, 3072, 32),
        # GPT-3 (arXiv 2005.14165, table 2.1), with full attention in each layer.
        "gpt3-175b": _gpt2(96, 12288, 96, sequence_length=2048),
        "llama-3-8b": _llama3(32, 4096, 32, 8, 14336),
        "llama-3-70b": _llama3(80, 8192, 64, 8, 28672),
        "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, tied=True),
        "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288, tied=False),
    }
)
