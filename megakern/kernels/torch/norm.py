"""LayerNorm and RMSNorm for any device, from PyTorch's native layer norm and row reductions.

native_layer_norm with fp32 weights keeps fp32 statistics for bf16 and fp16 input, so weights are widened for it.
"""

from __future__ import annotations

import torch


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def norm_forward(x, weight, bias, residual, eps, centre):
    """-> y (..., C), h (..., C) or empty, mean (...) or empty, rstd (...); statistics fp32 (fp64 for fp64)."""
    added = (x + residual).contiguous() if residual is not None else x.new_empty(0)
    h = (added if residual is not None else x).contiguous()
    wide_weight = weight.to(_wide(x))
    if centre:
        wide_bias = None if bias is None else bias.to(_wide(x))
        y, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], wide_weight, wide_bias, eps)
        return y, added, mean.squeeze(-1), rstd.squeeze(-1)
    wide = h.to(_wide(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd).mul_(wide_weight).to(x.dtype)
    return y, added, x.new_empty(0, dtype=_wide(x)), rstd.squeeze(-1)


def norm_backward(dy, dh, h, weight, mean, rstd, with_bias, centre):
    """-> dx (..., C) with dh added, dweight (C,), dbias (C,) or empty."""
    wide_weight = weight.to(rstd.dtype)
    if centre and h.numel() > 0:
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(),
            h.contiguous(),
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
