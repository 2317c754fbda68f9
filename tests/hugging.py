"""Small random Hugging Face models of every family that `mk.patch` knows, batches for them, and a float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="these tests need transformers: pip install megakern[dev]")

V, T, LAYERS = 96, 24, 2
_SHAPE = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": V, "n_positions": 64, "n_embd": 48, "n_layer": LAYERS, "n_head": 6, "initializer_range": 0.1,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
_ROPE = {
    "rope_type": "llama3", "rope_theta": 50.0, "original_max_position_embeddings": 16, "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 3.0,
}  # fmt: skip
# Grouped heads in all but GPT-2; a tied head in GPT-2; scaled rope in Llama; norms of queries and keys in Qwen3;
# windows in Mistral, and in the second layer of Qwen2.
FAMILIES = {
    "llama": lambda **more: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_SHAPE, "rope_parameters": _ROPE, **more})
    ),
    "qwen2": lambda **more: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **{
                **_SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, **more,
            }
        )
    ),
    "qwen3": lambda **more: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**_SHAPE, "head_dim": 10, **more})
    ),
    "mistral": lambda **more: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**_SHAPE, "sliding_window": 5, **more})
    ),
    "gpt2": lambda **more: transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**_GPT2, **more})),
}  # fmt: skip


def make(family: str, **more):
    """A model whose norms and biases show, with logits far from zero."""
    torch.manual_seed(0)
    model = FAMILIES[family](**more)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model.train()


def batch(kind: str, *, seed: int = 0, rows: int = 3) -> dict:
    """Tokens, labels and what goes with them: plain, left, right (padding), packed (positions restart)."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, V, (rows, T), generator=g)
    labels = tokens.clone()
    labels[0, 3:6] = -100  # as of a prompt
    if kind == "plain":
        return {"input_ids": tokens, "labels": labels}
    if kind == "packed":
        lengths = [(7, 1, 16), (T,), (10, 14)] * rows
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths[i]]) for i in range(rows)])
        labels = labels.masked_fill(positions == 0, -100)
        # Hugging Face looks for packed rows only where no cache is made.
        return {"input_ids": tokens, "labels": labels, "position_ids": positions, "use_cache": False}
    real = torch.arange(T) < torch.tensor([9, T, T - 1] * rows)[:rows, None]
    real = real.flip(-1) if kind == "left" else real
    tokens, labels = tokens.masked_fill(~real, 0), labels.masked_fill(~real, -100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": real.long()}


def wide(model):
    """A copy in float64 whose norms and rotary tables are not rounded to float32 on the way, as Hugging Face's are."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return model


def _norm(module):
    def forward(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    return forward


def reference_loss(model, inputs: dict) -> torch.Tensor:
    """The mean loss of label t + 1 at token t, from all the logits, in their precision."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def gradients(model) -> dict:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found
