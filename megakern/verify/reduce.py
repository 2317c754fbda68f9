"""A smaller model that a layout can go wrong in exactly as in the large one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from megakern.config import GPTConfig
from megakern.model.gpt import parameter_count

LIMIT = 20_000_000
"""Models with more parameters are reduced: five steps of this many take seconds on two CPU cores."""

_LAYERS, _HEAD_DIM, _TOKENS, _VOCABULARY = 2, 16, 128, 1000


def reduce_model(model: GPTConfig, tps: Iterable[int], *, keep_vocabulary: bool = False) -> GPTConfig:
    """`model` with few layers, narrow heads, a short sequence and (unless kept) a small vocabulary.

    All that meets the layout stays: the ratios of query to key heads, of MLP and heads to width, biases, norms,
    activation, positions, tied embeddings, dropout, parallel residual; heads and tokens are divisible by each of `tps`.
    """
    unit = math.lcm(*tps)
    group = model.heads // model.key_value_heads
    kv_heads = min(model.key_value_heads, unit if group > 1 else 2 * unit)  # two query heads a rank or more
    heads = kv_heads * group
    head_dim = min(model.size_of_head, _HEAD_DIM)
    share = model.width / (model.heads * model.size_of_head)  # 1, unless the model sets head_dim
    width = max(16, round(share * heads * head_dim / 16) * 16)
    tokens = min(model.sequence_length, -(-_TOKENS // unit) * unit)
    changes = {
        "layers": min(model.layers, _LAYERS),
        "heads": heads,
        "kv_heads": None if model.kv_heads is None else kv_heads,
        "head_dim": None if model.head_dim is None and width == heads * head_dim else head_dim,
        "width": width,
        "sequence_length": tokens,
    }
    if model.ffn_size is not None:
        step = 16 * unit
        changes["ffn_size"] = max(step, round(model.ffn_size / model.width * width / step) * step)
    if model.window is not None:
        changes["window"] = max(1, model.window * tokens // model.sequence_length)
    if not keep_vocabulary:
        changes["vocab_size"] = min(model.vocab_size, _VOCABULARY)
    return dataclasses.replace(model, **changes)


def describe_reduction(model: GPTConfig, small: GPTConfig) -> str:
    """What differs, for people."""
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    changed = [
        f"{name} {getattr(model, name)} -> {getattr(small, name)}"
        for name in names
        if getattr(model, name) != getattr(small, name) and getattr(model, name) is not None
    ]
    before, after = (parameter_count(each) / 1e6 for each in (model, small))
    return f"reduced from {before:,.1f} to {after:,.1f} million parameters: {', '.join(changed)}; --full-size keeps it"
