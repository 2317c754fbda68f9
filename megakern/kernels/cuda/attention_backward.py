"""Launcher of csrc/attention_backward.cu: dq, dk, dv in one pass over the keys, dq added up in fp32 scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megakern.kernels.cuda.attention_decode import copyable, features_of
from megakern.kernels.cuda.module import DTYPES, call, cdiv, pointer
from megakern.kernels.memory import empty, empty_like

QUERIES_IN_CACHE = 32 << 20
"""Bytes of q, dout and the sums of dq whose heads are computed side by side: they stay in the L2 cache of 50 MB."""


@dataclass(frozen=True)
class Tile:
    """BackwardTile of csrc/attention_backward.cuh, for which attention_backward.cu has code."""

    columns: int
    """The head dim that is computed."""
    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.keys} keys x {self.queries} queries"


TILES = {
    64: (Tile(64, 128, 128),),  # a thread's sums of dk and dv take 64 registers, two scores of 128 queries 128
    128: (
        Tile(128, 64, 128),  # sums 128, scores of 64 queries 64: with 128 queries they would be 256 of 240
        # For plain scores. Sums 128, scores 80, p 4 beside them. A step moves 456 KB through shared memory, that of 64
        # queries 384: 5 % more than a query's share. Not yet measured.
        Tile(128, 80, 128),
    ),
    256: (Tile(256, 64, 64),),  # sums of half the columns 128, scores 64: both consumers have the same keys
}
"""Up to a head dim: the largest tiles whose sums and scores fit a consumer's registers. Not yet measured on a GPU:
`python -m benchmarks.tune_attention --backend cuda --role backward` times all."""


FROM_REGISTERS = False
"""Does each thread add its part of dq to the sums in memory, where the order is free? Else it goes by way of shared
memory and the copy engine, 40 of the 456 KB of a step more. Not yet measured."""

LONG = 1024
"""Queries of a head, from which tiles of 80 cost less although the last is emptier: 13 x 456 KB to 16 x 384."""


def tile_for(D: int, T: int, plain: bool, full: bool) -> Tile:
    """plain: no cap, ALiBi or dropout, for which alone there is code for tiles but the first. full: every query sees
    every key, in sequences of one length. Under a causal mask larger steps compute more in vain along the diagonal:
    of 8192 queries 2 % more, of 2048 6 %."""
    tiles = TILES[next(most for most in TILES if most >= D)]
    return tiles[-1] if plain and full and T >= LONG else tiles[0]


def attention_backward(
    dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key,
    deterministic, sunk=False,
):  # fmt: skip
    """-> dq, dk, dv, contiguous. `limits.py` refuses what is not computed here. `deterministic`: dq repeats to the bit.
    `sunk`: more than the scores of keys is in lse, from which probabilities are computed in any case.

    Scratch memory: 4 bytes an element of q, its head dim and lengths rounded up to those of tiles, and 8 (with dropout
    16) for each query of each head.
    """
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    (T, H, D), (S, Hkv) = q.shape[-3:], k.shape[-3:-1]
    sequences = 0 if q_offsets is None else q_offsets.shape[0] - 1
    dout, q, k, v, out = (copyable(x) for x in (dout, q, k, v, out))
    if q_offsets is not None:
        dout, q, k, v, out = (x[None] for x in (dout, q, k, v, out))
        q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    slopes, features = features_of(slopes, softcap, dropout_p, dropout_key)
    lse = lse.contiguous()
    plain, full = slopes is None and softcap == 0 and dropout_p == 0, tuple(window) == (-1, -1) and q_offsets is None
    tile = tile_for(D, T, plain, full)
    rows, columns = tile.queries, tile.columns
    B = q.shape[0]
    lines = B * H * (cdiv(T, rows) if q_offsets is None else T // rows + sequences)
    sums = empty((lines, rows, columns), torch.float32, q.device)
    statistics = empty((lines, 2, rows), torch.float32, q.device)
    row_keys = empty((lines, rows), torch.int64, q.device) if dropout_p > 0 else None
    turns = empty((lines,), torch.int32, q.device) if deterministic else None
    direct = FROM_REGISTERS and not deterministic
    strides = [x.stride(dim) for x in (q, k, v, dout, out) for dim in (0, 1, 2)]
    call(
        "attention_backward", q, q.data_ptr(), k.data_ptr(), v.data_ptr(), dout.data_ptr(), out.data_ptr(),
        lse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), sums.data_ptr(), statistics.data_ptr(),
        pointer(row_keys), pointer(turns), lines, pointer(q_offsets), pointer(k_offsets), sequences, DTYPES[q.dtype],
        B, T, S, H, Hkv, D, *strides, *window, heads_at_a_time(T, H, Hkv, columns), rows, direct, scale, *features,
    )  # fmt: skip
    return dq, dk, dv


def heads_at_a_time(T: int, H: int, Hkv: int, D: int) -> int:
    """Heads of keys for whose queries `QUERIES_IN_CACHE` suffices, at least one."""
    return max(1, QUERIES_IN_CACHE // (8 * T * D * (H // Hkv)))
