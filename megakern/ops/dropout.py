"""Dropout whose mask is a pure function of (seed, row, column): the same on every backend and under every layout.

    out = residual + x * keep(row, column) / (1 - p)          row: the logical row of each row of x.view(-1, C)
    dx  = dout * keep(row, column) / (1 - p)                  the mask is computed again: nothing is saved but integers

The mask in exact form. Shifts `>>` are logical (zeros come in); all arithmetic is modulo 2^64 or 2^32:

    key(seed, row):  k = mix64(mix64(seed) + (row + 1) * 0x9E3779B97F4A7C15)        once a row, 64-bit
        mix64(z):    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                     z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                     z ^ (z >> 31)
    low, high = k mod 2^32, k >> 32
    element:         x = column * 0x9E3779B9 + low                                  once an element, 32-bit
                     x = (x ^ (x >> 16)) * 0x7FEB352D
                     x = x ^ high
                     x = (x ^ (x >> 15)) * 0x846CA68B
    keep:            x read as a signed 32-bit integer  >=  floor(p * 2^32) - 2^31  (p * 2^32 in float64 is exact)
    values:          x * (1 / (1 - p)), then + residual, in float32 (float64 for float64), rounded to x's dtype once

mix64 is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014). The 32-bit steps are lowbias32 (Wellons,
"Prospecting for Hash Functions", 2018) with the row's high half entered in the middle. Its last step, x ^ (x >> 16), is
left out: it cannot change the upper 16 bits, so it would move a decision only where those equal the threshold's.

Row i of x.view(-1, C) is the logical row  offset + (i // length) * stride + i % length:  blocks of `length` rows that
are neighbours, `stride` apart. A rank that holds T/R tokens of each sample of T has length T/R and stride T.

Other mappings of rows (attention: sample, head, query) fold one index after another:
k = mix64(mix64(mix64(mix64(seed) + (b + 1) g) + (h + 1) g) + (q + 1) g) with g = 0x9E3779B97F4A7C15.
"""

from __future__ import annotations

import torch

from megakern.ops import autocast, checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve

_MASK_64, _MASK_32 = (1 << 64) - 1, (1 << 32) - 1


def keep_reference(p: float, seed: int, rows: tuple[int, ...], column: int) -> bool:
    """Is the element kept? In Python integers, as the docstring of this file defines it; `rows` are folded in turn."""
    key = _mix64(seed)
    for row in rows:
        key = _mix64(key + (row + 1) * 0x9E3779B97F4A7C15)
    x = (column * 0x9E3779B9 + key) & _MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x ^= key >> 32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    signed = x - (1 << 32) if x >= 1 << 31 else x
    return signed >= int(p * 2.0**32) - (1 << 31)


def _mix64(z: int) -> int:
    z &= _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def dropout_reference(x, p, seed, *, row_offset=0, row_blocks=None, residual=None):
    """Slow: one Python loop over the elements for the mask, then plain PyTorch."""
    C = x.shape[-1]
    length, stride = row_blocks or (1, 1)
    rows = [row_offset + i // length * stride + i % length for i in range(x.numel() // C)]
    kept = [[keep_reference(p, seed, (row,), column) for column in range(C)] for row in rows]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) * (torch.tensor(kept, dtype=wide, device=x.device).reshape(x.shape) / (1.0 - p))
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)


@describes("dropout")
def _problem(x, p, seed, *, row_offset=0, row_blocks=None, residual=None) -> Problem:
    return Problem("dropout", x.device.type, x.dtype, {"C": x.shape[-1]}, {"residual": residual is not None})


def check_rate_and_seed(op: str, p_name: str, p: float, seed: int | None) -> None:
    """0 <= p < 1 and, when p > 0, a seed of 63 bits."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {p_name} must be at least 0 and less than 1, got {p}")
    if p > 0.0 and seed is None:
        raise ValueError(f"{op}: {p_name} is {p}, so a seed is needed; pass seed=, a new one for each step and layer")
    if seed is not None and not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be a Python int, got {type(seed).__name__}; use int(seed)")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"{op}: seed must be at least 0 and less than 2**63, got {seed}; use parallel.random.fold")


def _check(x, p, seed, row_offset, row_blocks, residual) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"dropout: x must have shape (..., C) with C > 0, got {tuple(x.shape)}")
    check_rate_and_seed("dropout", "p", p, seed)
    if row_offset < 0:
        raise ValueError(f"dropout: row_offset must be at least 0, got {row_offset}; it is the first row of this rank")
    if row_blocks is not None and not 1 <= row_blocks[0] <= row_blocks[1]:
        raise ValueError(
            f"dropout: row_blocks must be (length, stride) with 1 <= length <= stride, got {tuple(row_blocks)}; else "
            f"two rows would have one mask"
        )
    checks.floating("dropout", x=x, residual=residual)
    if residual is not None:
        checks.shape("dropout", "residual", residual, tuple(x.shape), "of x")


def _forward(x, residual, p, seed, rows, backend):
    return launcher(backend, "dropout", "dropout")(x, residual, p, seed, rows)


def _fake(x, residual, p, seed, rows, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, residual, ctx.p, ctx.seed, ctx.rows, ctx.backend = inputs
    ctx.has_residual = residual is not None


def _backward(ctx, dout):
    dx = _dropout(dout, None, ctx.p, ctx.seed, ctx.rows, ctx.backend)
    return dx, dout if ctx.has_residual else None, None, None, None, None


_dropout = register(  # rows: (offset, length, stride)
    "dropout",
    "(Tensor x, Tensor? residual, float p, SymInt seed, SymInt[3] rows, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def dropout(x, p, seed, *, row_offset=0, row_blocks=None, residual=None, backend=None):
    """Set each element of x to 0 with probability p, scale the others by 1 / (1 - p), and add residual if given.

    x (..., C), residual like x or None; p in [0, 1); seed a non-negative int below 2**63 (may be None when p is 0);
    row_offset: index, in the whole batch, of the first row of x.view(-1, C). row_blocks: (length, stride) when the rows
    are blocks of `length` neighbours whose first rows are `stride` apart; None: all are neighbours. Returns a tensor
    like x; with p = 0 that is x itself, or x + residual. Raises ValueError or TypeError on other values, shapes,
    dtypes, devices.
    """
    x, residual = autocast.alike(x, residual)
    _check(x, p, seed, row_offset, row_blocks, residual)
    chosen = resolve(_problem(x, p, seed, residual=residual), backend)
    if p == 0.0:
        return x if residual is None else x + residual
    return _dropout(x, residual, p, seed, [row_offset, *(row_blocks or (1, 1))], chosen)
