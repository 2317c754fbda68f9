"""Launchers of csrc/attention_forward.cu; those of csrc/attention_backward.cu are in a module of their own.

The copy engine wants rows that start on multiples of 16 bytes: other views are copied first.
"""

from __future__ import annotations

import torch

from megakern.kernels.cuda.dropout import threshold_of
from megakern.kernels.cuda.linear import multiprocessors
from megakern.kernels.cuda.module import DTYPES, call, pointer
from megakern.kernels.memory import empty, empty_like

KEYS_IN_CACHE = 32 << 20
"""Bytes of keys and values whose heads are computed side by side: they stay in the L2 cache of 50 MB."""


def attention_forward(
    q, k, v, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> out like q, lse (B, H, T), packed (H, T), in fp32. `limits.py` refuses what is not computed here."""
    (T, H, D), (S, Hkv) = q.shape[-3:], k.shape[-3:-1]
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
    call(
        "attention_forward", q, q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(q_offsets), pointer(k_offsets),
        out.data_ptr(), lse.data_ptr(), DTYPES[q.dtype], q.shape[0], T, S, H, Hkv, D, sequences, *strides, *window,
        heads_at_a_time(S, H, Hkv, D), multiprocessors(q.device), scale, *features,
    )  # fmt: skip
    return out, lse


def features_of(slopes, softcap: float, dropout_p: float, dropout_key) -> tuple[torch.Tensor | None, tuple]:
    """Slopes whose memory the second result names, to be kept alive, and the fields of api.h's AttentionFeatures."""
    slopes = None if slopes is None else slopes.contiguous()
    stride = 0 if slopes is None or slopes.ndim == 1 else slopes.shape[1]
    return slopes, (pointer(slopes), stride, softcap, *dropout_key, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p))


def heads_at_a_time(S: int, H: int, Hkv: int, D: int) -> int:
    """Query heads whose keys and values fit `KEYS_IN_CACHE`: whole groups, at least one."""
    return H // Hkv * max(1, KEYS_IN_CACHE // (4 * S * D))


def copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where the copy engine cannot take its rows as they lie."""
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(n > 0 and n % 8 == 0 for n in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def attention_backward(*arguments):
    """-> dq, dk, dv, contiguous, like q, k, v."""
    from megakern.kernels.cuda import attention_backward as backward  # which needs this module

    return backward.attention_backward(*arguments)
