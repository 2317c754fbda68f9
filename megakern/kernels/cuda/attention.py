"""Launchers of csrc/attention_forward.cu. The backward pass is Triton's on a GPU and PyTorch's composites on a CPU.

The copy engine wants rows that start on multiples of 16 bytes: other views are copied first.
"""

from __future__ import annotations

import torch

from megakern.kernels.cuda.module import DTYPES, call
from megakern.kernels.memory import empty, empty_like

KEYS_IN_CACHE = 32 << 20
"""Bytes of keys and values whose heads are computed side by side: they stay in the L2 cache of 50 MB."""


def attention_forward(
    q, k, v, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> out like q, lse (B, H, T) in fp32. `limits.py` refuses what is not computed here."""
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = torch.zeros_like(q), 1.0
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    out = empty_like(q)
    lse = empty((B, H, T), torch.float32, q.device)
    q, k, v = (_copyable(x) for x in (q, k, v))
    strides = [x.stride(dim) for x in (q, k, v) for dim in (0, 1, 2)]
    call(
        "attention_forward", q, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
        DTYPES[q.dtype], B, T, S, H, Hkv, D, *strides, *window, heads_at_a_time(S, H, Hkv, D), scale,
    )  # fmt: skip
    return out, lse


def heads_at_a_time(S: int, H: int, Hkv: int, D: int) -> int:
    """Query heads whose keys and values fit `KEYS_IN_CACHE`: whole groups, at least one."""
    return H // Hkv * max(1, KEYS_IN_CACHE // (4 * S * D))


def _copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where the copy engine cannot take its rows as they lie."""
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(n > 0 and n % 8 == 0 for n in x.stride()[:-1])
    return x if fits else x.contiguous()


def attention_backward(
    dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> dq, dk, dv, contiguous, like q, k, v."""
    if q.device.type == "cuda":
        from megakern.kernels.triton import attention
    else:
        from megakern.kernels.torch import attention
    how = (window, scale, softcap, dropout_p, dropout_key, deterministic)
    return attention.attention_backward(dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, *how)
