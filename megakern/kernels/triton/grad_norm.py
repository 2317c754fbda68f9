"""The sum of squares of many tensors in Triton: one launch for each dtype, and one that adds up; no atomics.

A program sums one piece of one tensor, found through a table of addresses, in fp32; the last kernel adds the pieces in
a fixed order, so that the norm repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakern.kernels.memory import empty
from megakern.kernels.triton import configs
from megakern.kernels.triton.adamw import pointer
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.tables import TYPES, address_table, aligned, pieces

# --- kernels ---


@triton.jit
def _grad_norm_squares(
    table, pieces_of, sums, TYPE: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr
):
    """Program i: sums[i] = the sum of squares of the i-th piece."""
    program = tl.program_id(0)
    row = tl.load(pieces_of + 2 * program)
    start = tl.load(pieces_of + 2 * program + 1).to(tl.int64) * PIECE
    values = pointer(table, row, 0, 2, TYPE, ALIGNED)
    count = tl.load(table + row * 2 + 1)
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    if start + PIECE <= count:  # no mask: with one, a load of 16 bytes would have to be 8 loads of 2
        for first in range(0, PIECE, TILE):
            value = tl.load(values + start + first + lane).to(tl.float32)
            total += value * value
    else:
        for begin in range(start, count, TILE):
            value = tl.load(values + begin + lane, begin + lane < count, 0.0).to(tl.float32)
            total += value * value
    tl.store(sums + program, tl.sum(total))


@triton.jit
def _grad_norm_total(sums, out, N, LANES: tl.constexpr):
    """One program: out = the sum of N numbers."""
    total = tl.zeros((LANES,), tl.float32)
    for first in range(0, N, LANES):
        at = first + tl.arange(0, LANES)
        total += tl.load(sums + at, at < N, 0.0)
    tl.store(out, tl.sum(total))


# --- launchers ---


def sum_of_squares(tensors):
    """-> 0-d, fp32."""
    groups: dict[torch.dtype, list[tuple[torch.Tensor]]] = {}
    for tensor in tensors:
        if tensor.numel() > 0:
            groups.setdefault(tensor.dtype, []).append((tensor.contiguous(),))
    device, config = tensors[0].device, configs.MANY_TENSORS
    owners = {dtype: pieces(rows, config.tiles["PIECE"]) for dtype, rows in groups.items()}
    sums = empty((sum(map_.shape[0] for map_ in owners.values()),), torch.float32, device)
    first = 0
    for dtype, rows in groups.items():
        count = owners[dtype].shape[0]
        arguments = (address_table(rows), owners[dtype], sums[first : first + count])
        launch(_grad_norm_squares, (count,), *arguments, config=config, TYPE=TYPES[dtype], ALIGNED=aligned(rows))
        first += count
    out = empty((), torch.float32, device)
    launch(_grad_norm_total, (1,), sums, out, first, config=configs.TOTAL)
    return out
