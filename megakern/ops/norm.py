"""LayerNorm and RMSNorm over the last dimension, each with an optional residual added first.

    h = x + residual                                   (h = x without residual)
    layer_norm:  y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias        Ba et al. 2016, arXiv 1607.06450
    rms_norm:    y = h / sqrt(mean(h^2) + eps) * weight                        Zhang and Sennrich 2019, arXiv 1910.07467

Shapes: x, residual, y, h (..., C); weight, bias (C,), of x's dtype or fp32. Statistics are fp32 (fp64 for fp64 input).
Saved for backward: h, weight, and per row mean and rstd (fp32). Nothing crosses ranks.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megakern.ops import autocast, checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve


def layer_norm_reference(x, weight, bias=None, eps=1e-5, *, residual=None):
    h = x if residual is None else x + residual
    wide = h.to(_statistics_dtype(h))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return y if residual is None else (y, h)


def rms_norm_reference(x, weight, eps=1e-6, *, residual=None):
    h = x if residual is None else x + residual
    wide = h.to(_statistics_dtype(h))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return y if residual is None else (y, h)


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@describes("layer_norm")
def _layer_norm_problem(x, weight, bias=None, eps=1e-5, *, residual=None) -> Problem:
    return Problem("layer_norm", x.device.type, x.dtype, {"C": x.shape[-1]}, {"residual": residual is not None})


@describes("rms_norm")
def _rms_norm_problem(x, weight, eps=1e-6, *, residual=None) -> Problem:
    return Problem("rms_norm", x.device.type, x.dtype, {"C": x.shape[-1]}, {"residual": residual is not None})


def _check(op: str, x, weight, bias, residual) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have shape (..., C) with C > 0, got {tuple(x.shape)}")
    checks.floating(op, x=x, residual=residual)
    checks.same_or_fp32(op, "x", x, weight=weight, bias=bias)
    checks.shape(op, "weight", weight, (x.shape[-1],), "(C,)", "pass one weight for each element of x's last dim")
    if bias is not None:
        checks.shape(op, "bias", bias, (x.shape[-1],), "(C,)", "pass one bias for each element of x's last dim")
    if residual is not None:
        checks.shape(op, "residual", residual, tuple(x.shape), "of x")


# --- custom ops. Without a residual, h is an empty tensor: a custom op must not return its own input. ---


def _empty_outputs(x, residual, with_mean):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = x.new_empty(x.shape[:-1], dtype=_statistics_dtype(x))
    mean = torch.empty_like(rstd) if with_mean else x.new_empty(0, dtype=rstd.dtype)
    return y, h, mean, rstd


def _empty_gradients(h, weight, with_bias):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight) if with_bias else weight.new_empty(0)


def _forward(x, weight, bias, residual, eps, centre, backend):
    return launcher(backend, "norm", "norm_forward")(x, weight, bias, residual, eps, centre)


def _fake(x, weight, bias, residual, eps, centre, backend):
    return _empty_outputs(x, residual, centre)


def _backward(dy, dh, h, weight, mean, rstd, with_bias, centre, backend):
    return launcher(backend, "norm", "norm_backward")(dy, dh, h, weight, mean, rstd, with_bias, centre)


def _backward_fake(dy, dh, h, weight, mean, rstd, with_bias, centre, backend):
    return _empty_gradients(h, weight, with_bias)


_norm_backward = register(
    "norm_backward",
    "(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor mean, Tensor rstd, bool with_bias, bool centre, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    forward=_backward,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, _, ctx.centre, ctx.backend = inputs
    _, h, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the residual stream was used
        return dh, None, None, dh, None, None, None
    dx, dweight, dbias = _norm_backward(
        dy, dh if ctx.has_residual else None, h, weight, mean, rstd, ctx.has_bias, ctx.centre, ctx.backend
    )
    return dx, dweight, dbias if ctx.has_bias else None, dx if ctx.has_residual else None, None, None, None


_norm = register(
    "norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool centre, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def layer_norm(x, weight, bias=None, eps=1e-5, *, residual=None, backend=None):
    """LayerNorm over the last dim, of x or of x + residual.

    x (..., C), weight (C,), bias (C,) or None, residual like x or None; weight and bias of x's dtype or fp32.
    Returns y like x; with residual `(y, x + residual)`. Raises ValueError or TypeError on other shapes, dtypes or
    devices.
    """
    if autocast.to_widen(x, weight, bias, residual):
        return _in_fp32(layer_norm, x, (weight, bias), eps, residual=residual, backend=backend)
    _check("layer_norm", x, weight, bias, residual)
    chosen = resolve(_layer_norm_problem(x, weight, residual=residual), backend)
    y, h, _, _ = _norm(x, weight, bias, residual, eps, True, chosen)
    return y if residual is None else (y, h)


def rms_norm(x, weight, eps=1e-6, *, residual=None, backend=None):
    """RMSNorm over the last dim, of x or of x + residual.

    x (..., C), weight (C,) of x's dtype or fp32, residual like x or None.
    Returns y like x; with residual `(y, x + residual)`. Raises ValueError or TypeError on other shapes, dtypes or
    devices.
    """
    if autocast.to_widen(x, weight, residual):
        return _in_fp32(rms_norm, x, (weight,), eps, residual=residual, backend=backend)
    _check("rms_norm", x, weight, None, residual)
    chosen = resolve(_rms_norm_problem(x, weight, residual=residual), backend)
    y, h, _, _ = _norm(x, weight, None, residual, eps, False, chosen)
    return y if residual is None else (y, h)


def _in_fp32(norm, x, parameters, eps, *, residual, backend):
    """Under autocast. What is narrow as a sum is returned as one, as that of PyTorch's operators would be."""
    parameters = autocast.widened(*parameters)
    if residual is None or torch.promote_types(x.dtype, residual.dtype) not in autocast.NARROW:
        x, residual = autocast.widened(x, residual)
        return norm(x, *parameters, eps, residual=residual, backend=backend)
    _check(norm.__name__, x, parameters[0], None, residual)
    h = x + residual
    return norm(h.float(), *parameters, eps, backend=backend), h


class _OfStream(torch.autograd.Function):
    """x -> norm(x), x: what else reads x sends its gradient through the norm's backward, which adds it in its pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, centre, backend):
        y, _, mean, rstd = _norm(x, weight, bias, None, eps, centre, backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias, ctx.centre, ctx.backend = bias is not None, centre, backend
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream):
        if dy is None:
            return dstream, None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _norm_backward(dy, dstream, x, weight, mean, rstd, ctx.has_bias, ctx.centre, ctx.backend)
        return dx, dweight, dbias if ctx.has_bias else None, None, None, None


def norm_of_stream(x, weight, bias=None, eps=1e-5, *, centre):
    """-> layer_norm(x) with `centre`, else rms_norm(x); and x, to be read in its place by all that comes after.

    The sum of their gradients is then no pass of its own. Steps of a 6-layer, 384-wide GPT in bf16 on two loaded cores,
    ms, least and median of 25: 266, 289; with a pass 275, 293.
    """
    if autocast.to_widen(x, weight, bias):
        return (layer_norm(x, weight, bias, eps) if centre else rms_norm(x, weight, eps)), x
    _check("layer_norm" if centre else "rms_norm", x, weight, bias, None)
    chosen = resolve((_layer_norm_problem if centre else _rms_norm_problem)(x, weight))
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():  # which fuses by itself
        return _OfStream.apply(x, weight, bias, eps, centre, chosen)
    return _norm(x, weight, bias, None, eps, centre, chosen)[0], x
