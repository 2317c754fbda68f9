"""Launchers of csrc/norm.cu: LayerNorm and RMSNorm, forward and backward."""

from __future__ import annotations

import torch

from megakern.kernels.cuda import configs
from megakern.kernels.cuda.module import DTYPES, call, pointer, strided
from megakern.kernels.memory import empty, empty_like, nothing, vector


def norm_forward(x, weight, bias, residual, eps, centre):
    """-> y (..., C), h (..., C) or empty, mean (...) or empty, rstd (...); statistics fp32."""
    *rows, C = x.shape
    y = empty_like(x)
    h = nothing(x) if residual is None else empty_like(x)
    rstd = empty(rows, torch.float32, x.device)
    mean = empty_like(rstd) if centre else nothing(rstd)
    M = rstd.numel()
    if M == 0:
        return y, h, mean, rstd
    x, x_stride = strided(x)
    added, added_stride = (None, 0) if residual is None else strided(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    config = configs.norm_forward(C, x.element_size(), residual is not None, configs.kind_of(x.get_device()))
    call(
        "norm_forward", x,
        x.data_ptr(), pointer(added), weight.data_ptr(), pointer(bias), y.data_ptr(),
        0 if added is None else h.data_ptr(), mean.data_ptr() if centre else 0, rstd.data_ptr(),
        DTYPES[x.dtype], DTYPES[weight.dtype], M, x_stride, added_stride, C, eps, *config.of(M),
    )  # fmt: skip
    return y, h, mean, rstd


def norm_backward(dy, dh, h, weight, mean, rstd, with_bias, centre):
    """-> dx (..., C) with dh added, dweight (C,), dbias (C,) or empty."""
    C, M = h.shape[-1], rstd.numel()
    dx = empty_like(h)
    dweight = vector(C, weight)
    dbias = vector(C, weight) if with_bias else nothing(weight)
    (dy, dy_stride), (h, h_stride) = strided(dy), strided(h)
    dh, dh_stride = (None, 0) if dh is None else strided(dh)
    weight = weight.contiguous()
    config = configs.norm_backward(C, h.element_size(), dh is not None, configs.kind_of(h.get_device()))
    shape = config.of(M)
    parts = shape[3] * C
    sums = vector(2 * parts if with_bias else parts, rstd)
    start = sums.data_ptr()
    call(
        "norm_backward", h,
        dy.data_ptr(), pointer(dh), h.data_ptr(), weight.data_ptr(), mean.data_ptr() if centre else 0, rstd.data_ptr(),
        dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr() if with_bias else 0,
        start, start + 4 * parts if with_bias else 0,
        DTYPES[h.dtype], DTYPES[weight.dtype], M, dy_stride, dh_stride, h_stride, C, *shape,
    )  # fmt: skip
    return dx, dweight, dbias
