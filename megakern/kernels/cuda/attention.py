"""Launchers of csrc/attention_forward.cu, and of attention_decode.cu for few queries.

The copy engine wants rows that start on multiples of 16 bytes: other views are copied first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from megakern.kernels.cuda.attention_backward import attention_backward
from megakern.kernels.cuda.attention_decode import copyable, decode, decodes, features_of
from megakern.kernels.cuda.linear import multiprocessors
from megakern.kernels.cuda.module import DTYPES, call, cdiv, pointer
from megakern.kernels.memory import empty, empty_like

__all__ = ["attention_backward", "attention_forward"]

KEYS_IN_CACHE = 32 << 20
"""Bytes of keys and values whose heads are computed side by side: they stay in the L2 cache of 50 MB."""


@dataclass(frozen=True)
class Tile:
    """AttentionTile of csrc/attention_forward.cu, which has code for those below."""

    queries: int
    """64 of each consumer warpgroup: two of them with 240 registers a thread, or three with 160."""
    keys: int
    why: str = ""

    def __str__(self) -> str:
        return f"{self.queries} queries x {self.keys} keys"


TILES = {
    64: (
        Tile(128, 128, "429 TFLOP/s causal, 432 full on an H200 (1 x 16384 x 32 x 32, commit 519726e)"),
        Tile(192, 128, "three consumers, for plain scores of long sequences, as FlashAttention-3; not yet measured"),
    ),
    96: (Tile(128, 128, "as head dim 128"),),
    128: (
        Tile(128, 128, "566 TFLOP/s causal, 589 full on an H200 (2 x 8192 x 64 x 8, commit 519726e)"),
        Tile(128, 176, "for plain scores; no room to fetch the next tile's queries ahead; not yet measured"),
    ),
    192: (Tile(128, 112, "the most keys whose two stages fit shared memory"),),
    256: (Tile(128, 80, "the most keys whose two stages fit shared memory"),),
}
"""Up to a head dim. `python -m benchmarks.tune_attention --backend cuda` times all."""

LONG = 2048
"""Queries of a head, from which tiles of 192 are at most 4.5 % empty in their last row of tiles."""


def tile_for(D: int, T: int, plain: bool) -> Tile:
    """plain: a scale above 0, no cap, ALiBi or dropout, for which alone there is code for tiles but the first."""
    tiles = TILES[next(most for most in TILES if most >= D)]
    return next((tile for tile in tiles if tile.queries == 192 and plain and T >= LONG), tiles[0])


class Pairs(enum.IntEnum):
    """AttentionPairs of csrc/api.h: what the two blocks of a cluster compute, for which keys and values come once."""

    NONE = 0
    HEADS = 1
    TILES = 2

    def __str__(self) -> str:
        return "single blocks" if self is Pairs.NONE else f"blocks that fetch for two {self.name.lower()}"


PAIRED_DEPTH = 128
"""Head dim from which blocks are paired where they can. At full speed a multiprocessor would read keys and values at 32
bytes a cycle (64 KB for 128 queries in 2048 cycles), of the 24 to 32 that the L2 cache gives; paired it reads 16.
Smaller head dims are slower, for their exponentials. FlashAttention-3 pairs tiles from 128 on, without a mask; not yet
measured."""


def possible_pairs(T: int, H: int, Hkv: int, tile: Tile, sees_all: bool) -> tuple[Pairs, ...]:
    """The best first. sees_all: each query sees all keys, and samples are not packed."""
    heads = (Pairs.HEADS,) if H // Hkv % 2 == 0 else ()
    tiles = (Pairs.TILES,) if sees_all and cdiv(T, tile.queries) % 2 == 0 else ()
    return *heads, *tiles, Pairs.NONE


def pairs_for(D: int, *problem) -> Pairs:
    """problem: as of possible_pairs."""
    return possible_pairs(*problem)[0] if D >= PAIRED_DEPTH else Pairs.NONE


def attention_forward(
    q, k, v, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> out like q, lse (B, H, T), packed (H, T), in fp32. `limits.py` refuses what is not computed here."""
    (T, H, D), (S, Hkv) = q.shape[-3:], k.shape[-3:-1]
    if decodes(T, H // Hkv, q_offsets is not None, dropout_p > 0):
        return decode(q, k, v, None, None, slopes, window, scale, softcap)
    out = empty_like(q)
    lse = empty((*q.shape[:-3], H, T), torch.float32, q.device)
    if q.numel() == 0:
        return out, lse
    q, k, v = (copyable(x) for x in (q, k, v))
    sequences = 0
    if q_offsets is not None:
        q, k, v = q[None], k[None], v[None]
        q_offsets, k_offsets, sequences = q_offsets.contiguous(), k_offsets.contiguous(), q_offsets.shape[0] - 1
    strides = [x.stride(dim) for x in (q, k, v) for dim in (0, 1, 2)]
    slopes, features = features_of(slopes, softcap, dropout_p, dropout_key)
    tile = tile_for(D, T, slopes is None and softcap == 0 and dropout_p == 0 and scale > 0)
    pairs = pairs_for(D, T, H, Hkv, tile, q_offsets is None and tuple(window) == (-1, -1))
    call(
        "attention_forward", q, q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(q_offsets), pointer(k_offsets),
        out.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], q.shape[0], T, S, H, Hkv, D, sequences, *strides, *window,
        heads_at_a_time(S, H, Hkv, D), multiprocessors(q.device), tile.queries, tile.keys, pairs, scale,
        *features,
    )  # fmt: skip
    return out, lse


def heads_at_a_time(S: int, H: int, Hkv: int, D: int) -> int:
    """Query heads whose keys and values fit `KEYS_IN_CACHE`: whole groups, at least one."""
    return H // Hkv * max(1, KEYS_IN_CACHE // (4 * S * D))
