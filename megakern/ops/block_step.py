"""One transformer block over a few new tokens and the pages of a cache: a step of generation. No gradient.

hidden (B, T, C): the T last tokens of each sequence. The block is that of `megakern/layers/block.py`, the rows of qkv
are those of `megakern/layers/attention.py`, pages and places those of `megakern/ops/paged_attention.py`:

    q, k, v = split(norm1(h) qkv^T + b); q, k = rope(q_norm(q), k_norm(k)); k, v go into the pages
    m = h + attention(q, pages) proj^T + b
    out = m + act(norm2(m) fc1^T + b) fc2^T + b       gated: silu(.. fc1^T + b) * (.. up^T + b); parallel: norm1(h)

It is one C++ kernel for CPUs or, where that does not fit, no op at all: layers then run their ops one by one. Between
products values are rounded to hidden's dtype, as those ops round them. Nothing crosses ranks: it is for one rank.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from megakern.kernels.torch import native
from megakern.ops import autocast, dispatch
from megakern.ops.activation import activation_reference
from megakern.ops.linear import linear_reference
from megakern.ops.norm import layer_norm_reference, rms_norm_reference
from megakern.ops.paged_attention import paged_attention_reference
from megakern.ops.rope import rope_reference

Parameters = tuple[torch.Tensor, torch.Tensor | None]
"""weight and bias."""


class BlockWeights(NamedTuple):
    """What one block holds; all tensors of one dtype."""

    norm1: Parameters
    norm2: Parameters | None
    """None: a parallel residual."""
    q_norm: Parameters | None
    k_norm: Parameters | None
    qkv: Parameters
    proj: Parameters
    fc1: Parameters
    up: Parameters | None
    """Not None: gated, fc1 is the gate."""
    fc2: Parameters
    heads: int
    kv_heads: int
    head_dim: int
    centre: bool
    """LayerNorm, else RMSNorm."""
    activation: str
    window: int | None
    eps: float
    head_eps: float

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(itertools.chain.from_iterable(pair or (None, None) for pair in self[:9]))


class Pages(NamedTuple):
    """keys, values (pages, page_size, G, D), block_table (B, P) int32, lengths (B,) int32 with the new tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor


def block_step_reference(hidden, weights: BlockWeights, pages: Pages, rope=None):
    """Same arguments and results as `block_step`, in plain PyTorch; the pages are written too."""
    w, (B, T, _) = weights, hidden.shape
    n = w.heads // w.kv_heads

    def norm(x, pair, eps, centre):
        weight, bias = pair
        return layer_norm_reference(x, weight, bias, eps) if centre else rms_norm_reference(x, weight, eps)

    normed = norm(hidden, w.norm1, w.eps, w.centre)
    rows = linear_reference(normed, *w.qkv).view(B, T, w.kv_heads, n + 2, w.head_dim)
    q, (k, v) = rows[..., :n, :], rows[..., n:, :].unbind(3)
    if w.q_norm is not None:
        q, k = norm(q, w.q_norm, w.head_eps, False), norm(k, w.k_norm, w.head_eps, False)
    q = q.reshape(B, T, w.heads, w.head_dim)
    positions = pages.lengths[:, None].long() - T + torch.arange(T)
    if rope is not None:
        q, k = rope_reference(q, k, *rope, positions=positions)
    size = pages.keys.shape[1]
    slots = pages.block_table.long().gather(1, positions // size) * size + positions % size
    for cache, new in ((pages.keys, k), (pages.values, v)):
        cache.flatten(0, 1)[slots] = new
    o = paged_attention_reference(q, *pages, window=None if w.window is None else (w.window, 0))
    middle = linear_reference(o.flatten(2), *w.proj, residual=hidden)
    normed = normed if w.norm2 is None else norm(middle, w.norm2, w.eps, w.centre)
    if w.up is None:
        inner = linear_reference(normed, *w.fc1, activation=w.activation)
    else:
        gate, up = linear_reference(normed, *w.fc1), linear_reference(normed, *w.up)
        inner = activation_reference(gate, "silu") * up
    return linear_reference(inner, *w.fc2, residual=middle)


def block_step(
    hidden: torch.Tensor,
    weights: BlockWeights,
    pages: Pages,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    kept: dict | None = None,
) -> torch.Tensor | None:
    """hidden (B, T, C) -> (B, T, C); None, and nothing is done, where no kernel takes it or another was asked for.

    rope: cos, sin (positions, D/2) fp32. kept: what a call leaves there spares the next one, of the same block and
    pages, a part of its work. Raises ValueError for lengths, pages or positions that are not there.
    """
    if (
        dispatch.is_overridden()
        or autocast.autocast_dtype(hidden) is not None
        or not native.takes_step(hidden)
        or hidden.dtype != pages.keys.dtype
    ):
        return None
    if rope is not None and (rope[0].dtype != torch.float32 or 2 * rope[0].shape[1] != weights.head_dim):
        return None
    prepared = None if kept is None else kept.get("block_step")
    if prepared is None or not prepared.holds(weights, pages.keys, pages.values):
        prepared = native.prepared_block(weights, pages.keys, pages.values)
        if prepared is None:
            return None
        if kept is not None:
            kept["block_step"] = prepared
    out = torch.empty_like(hidden)
    prepared.run(hidden, pages.block_table, pages.lengths, rope, out)
    return out
