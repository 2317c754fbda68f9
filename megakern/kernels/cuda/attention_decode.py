"""Launcher of csrc/attention_decode.cu: few queries against many keys, in one tensor or in pages."""

from __future__ import annotations

import torch

from megakern.kernels.cuda.dropout import threshold_of
from megakern.kernels.cuda.module import DTYPES, call, cdiv, pointer
from megakern.kernels.memory import empty, empty_like

ROWS = 16
"""Of a group (query heads of a key-value head, times queries) that a block computes; more read the keys again."""
FEW_ROWS = 64
"""Of a group, up to which this kernel is taken. Not yet measured."""
MULTIPROCESSORS = 132  # of the largest sm_90, never the GPU's own count: pieces, and so the bits, are the same on all
MOST_SPLITS = 128


def decodes(T: int, G: int, packed: bool, dropout: bool) -> bool:
    return T * G <= FEW_ROWS and not packed and not dropout


def key_splits(programs: int, S: int, D: int) -> int:
    """Pieces of S keys: the fewest within 85 % of the best share of busy places, two tiles or more for each warp."""
    places = MULTIPROCESSORS * (2 if D <= 128 else 1)
    least = 4 * 2 * (32 if D <= 64 else 16)
    most = max(1, min(MOST_SPLITS, cdiv(S, least)))
    busy = [n * programs / (cdiv(n * programs, places) * places) for n in range(1, most + 1)]
    return 1 + next(n for n, share in enumerate(busy) if share >= 0.85 * max(busy))


def copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where rows of 16 bytes cannot be taken as they lie."""
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(n > 0 and n % 8 == 0 for n in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def features_of(slopes, softcap: float, dropout_p: float, dropout_key) -> tuple[torch.Tensor | None, tuple]:
    """Slopes whose memory the second result names, to be kept alive, and the fields of api.h's AttentionFeatures."""
    slopes = None if slopes is None else slopes.contiguous()
    stride = 0 if slopes is None or slopes.ndim == 1 else slopes.shape[1]
    return slopes, (pointer(slopes), stride, softcap, *dropout_key, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p))


def decode(q, k, v, table, lengths, slopes, window, scale, softcap):
    """q (B, T, H, D); k, v (B, S, Hkv, D), or with table (B, P) and lengths (B,) pages (pages, size, Hkv, D)
    -> out like q, lse (B, H, T) in fp32."""
    (B, T, H, D), (_, S, Hkv, _) = q.shape, k.shape
    out = empty_like(q)
    lse = empty((B, H, T), torch.float32, q.device)
    if q.numel() == 0:
        return out, lse
    q, k, v = (copyable(x) for x in (q, k, v))
    pages, page_size, columns, stride = 0, 0, 0, 0
    if table is not None:
        pages, page_size, columns, stride = k.shape[0], S, table.shape[1], table.stride(0)
        S = columns * page_size  # the most that there may be
    splits = key_splits(B * Hkv * cdiv(T * (H // Hkv), ROWS), S, D)
    parts = part_lse = None
    if splits > 1:
        parts = empty((splits, B, T, H, D), torch.float32, q.device)
        part_lse = empty((splits, B, H, T), torch.float32, q.device)
    strides = [x.stride(dim) for x in (q, k, v) for dim in (0, 1, 2)]
    slopes, features = features_of(slopes, softcap, 0.0, (0, 0, 0))
    call(
        "attention_decode", q, q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(table), pointer(lengths),
        out.data_ptr(), lse.data_ptr(), pointer(parts), pointer(part_lse), DTYPES[q.dtype], B, T, S, H, Hkv, D,
        *strides, pages, page_size, columns, stride, *window, splits, scale, *features,
    )  # fmt: skip
    return out, lse
