"""megakern: transformer kernels and tensor-parallel GPT pretraining, from a laptop to a cluster.

The names below are loaded on first use, so that `import megakern` takes no time and needs no GPU, compiler or Triton.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_WHERE = {
    "attention": "ops.attention",
    "paged_attention": "ops.paged_attention",
    "rope": "ops.rope",
    "linear": "ops.linear",
    "linear_swiglu": "ops.mlp",
    "gelu": "ops.activation",
    "swiglu": "ops.activation",
    "cross_entropy": "ops.cross_entropy",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "AdamW": "ops.adamw",
    "clip_grad_norm_": "ops.grad_norm",
    "LayerNorm": "layers.norm",
    "RMSNorm": "layers.norm",
    "ColumnParallelLinear": "layers.linear",
    "RowParallelLinear": "layers.linear",
    "VocabParallelEmbedding": "layers.embedding",
    "ParallelAttention": "layers.attention",
    "ParallelMLP": "layers.mlp",
    "TransformerBlock": "layers.block",
    "GPT": "model.gpt",
    "GPTConfig": "config",
    "presets": "model.presets",
    "ParallelContext": "parallel.context",
    "finish_gradients": "parallel.collectives",
    "layer_norm": "ops.norm",
    "rms_norm": "ops.norm",
    "use_backend": "ops.dispatch",
    "explain": "ops.dispatch",
    "autotune": "kernels.triton.tune",
    "patch": "patching.patch",
    "unpatch": "patching.patch",
    "SpeedCallback": "patching.speed",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'megakern' has no attribute {name!r}; it has {', '.join(sorted(_WHERE))}")
    value = getattr(importlib.import_module(f"megakern.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
