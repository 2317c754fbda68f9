"""Launcher of csrc/dropout.cu: counter-based dropout with an optional residual."""

from __future__ import annotations

import math

from megakern.kernels.cuda.module import DTYPES, call, pointer, strided
from megakern.kernels.memory import empty_like


def threshold_of(p: float) -> int:
    """The smallest signed 32-bit value that is kept."""
    return math.floor(p * 2.0**32) - (1 << 31)


def dropout(x, residual, p, seed, rows):
    """rows (offset, length, stride) -> contiguous, like x: some elements 0, the others scaled, plus residual."""
    out = empty_like(x)
    C = x.shape[-1]
    x, x_stride = strided(x)
    added, added_stride = (None, 0) if residual is None else strided(residual)
    call(
        "dropout", x,
        x.data_ptr(), pointer(added), out.data_ptr(), DTYPES[x.dtype], x.numel() // C, C, x_stride, added_stride,
        seed, *rows, threshold_of(p), 1.0 / (1.0 - p),
    )  # fmt: skip
    return out
