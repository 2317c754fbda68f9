"""Counter-based dropout in Triton; `megakern/ops/dropout.py` defines the mask, bit for bit. Elementwise, writes = .

`row_key`, `fold` and `keep` are the parts of that definition; attention uses them too.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from megakern.kernels.memory import empty_like, rows_of
from megakern.kernels.triton import configs
from megakern.kernels.triton.activation import tile
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def seed_key(seed):
    """The uint64 key of an integer seed."""
    return _mix(tl.cast(seed, tl.int64).to(tl.uint64))  # torch's analysis of kernels passes Python's 1 for a 1


@triton.jit
def fold(key, index):
    """New uint64 keys from uint64 keys and integer indices (broadcast)."""
    return _mix(key + (tl.cast(index, tl.int64).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)


@triton.jit
def keep(key, column, threshold):
    """Is the element kept? uint64 keys of rows, integer columns (broadcast); threshold int32, see `threshold_of`."""
    x = column.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x.to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])
def _dropout(
    x, residual, out, M, C, x_stride, residual_stride, seed, offset, length, distance, threshold, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program i: tile i of out."""
    rows, cols, mask = tile(M, C, ROWS, COLS)
    logical = offset + rows // length * distance + rows % length
    kept = keep(fold(seed_key(seed), logical), cols, threshold)
    value = tl.load(x + rows * x_stride + cols, mask, 0.0).to(tl.float32)
    value *= tl.where(kept, scale, 0.0)  # a product, as the definition says: a dropped NaN stays NaN
    if residual is not None:
        value += tl.load(residual + rows * residual_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(out + rows * C + cols, value.to(out.dtype.element_ty), mask)


# --- launchers ---


def threshold_of(p: float) -> int:
    """The smallest signed 32-bit value that is kept."""
    return math.floor(p * 2.0**32) - (1 << 31)


def dropout(x, residual, p, seed, rows):
    """rows (offset, length, stride) -> contiguous, like x: some elements 0, the others scaled, plus residual."""
    out = empty_like(x)
    x = rows_of(x)
    M, C = x.shape
    added = None if residual is None else rows_of(residual)
    config = configs.elementwise(C)
    strides = (x.stride(0), 0 if added is None else added.stride(0))
    key = (seed, *rows, threshold_of(p), 1.0 / (1.0 - p))
    launch(_dropout, (configs.tile_count(M, C, config),), x, added, out, M, C, *strides, *key, config=config)
    return out
