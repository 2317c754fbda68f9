"""LayerNorm and RMSNorm for any device, from PyTorch's native layer norm and row reductions; on CPUs in C++.

native_layer_norm with fp32 weights keeps fp32 statistics for bf16 and fp16 input, so weights are widened for it.
"""

from __future__ import annotations

import torch

from megakern.kernels.torch import native


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mixable(x):
    """PyTorch's layer norm takes weights of another dtype than x on CPUs alone."""
    return x if x.device.type == "cpu" else x.to(_wide(x))


def norm_forward(x, weight, bias, residual, eps, centre):
    """-> y (..., C), h (..., C) or empty, mean (...) or empty, rstd (...); statistics fp32 (fp64 for fp64)."""
    if native.takes(x, residual):
        return _native_forward(x, weight, bias, residual, eps, centre)
    added = (x + residual).contiguous() if residual is not None else x.new_empty(0)
    h = (added if residual is not None else x).contiguous()
    wide_weight = weight.to(_wide(x))
    if centre:
        wide_bias = None if bias is None else bias.to(_wide(x))
        y, mean, rstd = torch.native_layer_norm(_mixable(h), h.shape[-1:], wide_weight, wide_bias, eps)
        return y.to(x.dtype), added, mean.squeeze(-1), rstd.squeeze(-1)
    wide = h.to(_wide(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd).mul_(wide_weight).to(x.dtype)
    return y, added, x.new_empty(0, dtype=_wide(x)), rstd.squeeze(-1)


def norm_backward(dy, dh, h, weight, mean, rstd, with_bias, centre):
    """-> dx (..., C) with dh added, dweight (C,), dbias (C,) or empty."""
    if native.takes(dy, dh, h):
        return _native_backward(dy, dh, h, weight, mean, rstd, with_bias, centre)
    wide_weight = weight.to(rstd.dtype)
    if centre and h.numel() > 0:
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            _mixable(dy.contiguous()),
            _mixable(h.contiguous()),
            h.shape[-1:],
            mean.unsqueeze(-1),
            rstd.unsqueeze(-1),
            wide_weight,
            wide_weight if with_bias else None,
            [True, True, with_bias],
        )
    else:
        normed = h.reshape(-1, h.shape[-1]).to(rstd.dtype) * rstd.reshape(-1, 1)
        wide_dy = dy.reshape(normed.shape).to(rstd.dtype)
        dweight = (wide_dy * normed).sum(0)
        dbias = wide_dy.sum(0) if with_bias else None
        scaled = wide_dy * wide_weight
        dx = scaled.addcmul_(normed, (scaled * normed).mean(-1, keepdim=True), value=-1).mul_(rstd.reshape(-1, 1))
        dx = dx.to(h.dtype).reshape(h.shape)
    if dh is not None:
        dx = dx + dh
    dbias = dbias.to(weight.dtype) if with_bias else weight.new_empty(0)
    return dx.contiguous(), dweight.to(weight.dtype), dbias


def _native_forward(x, weight, bias, residual, eps, centre):
    shape = (-1, x.shape[-1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centre else None
    rows = [None if t is None else t.reshape(shape) for t in (x, residual)]
    outputs = [None if t is None else t.view(shape) for t in (h, y)]
    native.norm_forward(*rows, weight, bias, eps, centre, *outputs, mean, rstd)
    return y, x.new_empty(0) if h is None else h, rstd.new_empty(0) if mean is None else mean, rstd


def _native_backward(dy, dh, h, weight, mean, rstd, with_bias, centre):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty(h.shape[-1], dtype=torch.float32)
    dbias = torch.empty_like(dweight) if with_bias else None
    rows = [None if t is None else t.reshape(-1, h.shape[-1]) for t in (dy, dh, h)]
    target = dx.view(-1, h.shape[-1])
    native.norm_backward(*rows, weight, mean if centre else None, rstd, target, dweight, dbias, centre)
    return dx, dweight.to(weight.dtype), weight.new_empty(0) if dbias is None else dbias.to(weight.dtype)
