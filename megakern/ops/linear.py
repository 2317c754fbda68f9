"""A linear layer with what usually follows it.

    y = act(x W^T + bias) + residual            act: none, gelu, gelu_tanh, relu_squared, silu (see activation.py)

Shapes: x (..., K), weight (N, K), bias (N,), residual and y (..., N). M = product of the leading dims.
Backward, with dz = dy act'(x W^T + bias):

    dx = dz W        dweight = dz^T x        dbias = sum of dz over rows        dresidual = dy

dx and dweight are separate ops, so that a collective on dx can run beside the product of dweight. Sums over M are
made in fp32. Saved for backward: weight if x needs a gradient, x if weight does, the pre-activation if there is an
activation. Nothing crosses ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakern.ops import checks
from megakern.ops.activation import KINDS, activation_backward, activation_reference
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve


def linear_reference(x, weight, bias=None, *, activation=None, residual=None):
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation is not None:
        y = activation_reference(y, activation)
    return y if residual is None else y + residual


@describes("linear")
def _problem(x, weight, bias=None, *, activation=None, residual=None) -> Problem:
    N, K = weight.shape
    options = {"activation": activation, "bias": bias is not None, "residual": residual is not None}
    return Problem("linear", x.device.type, x.dtype, {"M": x.numel() // K if K else 0, "N": N, "K": K}, options)


def _check(x, weight, bias, activation, residual) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"linear: weight must have shape (N, K) with N, K > 0, got {tuple(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x must have shape (..., K) with K = {weight.shape[1]} of weight (N, K), got {tuple(x.shape)}; "
            f"weight is (out, in), as in torch.nn.Linear"
        )
    if activation is not None and activation not in KINDS:
        raise ValueError(f"linear: activation must be None or one of {', '.join(KINDS)}, got {activation!r}")
    checks.floating("linear", x=x, weight=weight, residual=residual)
    if bias is not None:
        checks.same_or_fp32("linear", "x", x, bias=bias)
        checks.shape("linear", "bias", bias, (weight.shape[0],), "(N,)", "pass one bias for each row of weight")
    if residual is not None:
        checks.shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]), "(..., N) of the output")


# --- custom ops. The pre-activation is an empty tensor where it is not kept. ---


def _forward(x, weight, bias, residual, activation, keep, backend):
    return launcher(backend, "linear", "linear_forward")(x, weight, bias, residual, activation, keep)


def _fake(x, weight, bias, residual, activation, keep, backend):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _input_gradient(dy, weight, backend):
    return launcher(backend, "linear", "linear_input_gradient")(dy, weight)


def _weight_gradient(dy, x, bias_dtype, with_weight, backend):
    return launcher(backend, "linear", "linear_weight_gradient")(dy, x, bias_dtype, with_weight)


def _weight_gradient_fake(dy, x, bias_dtype, with_weight, backend):
    dweight = dy.new_empty((dy.shape[-1], x.shape[-1]) if with_weight else 0)
    return dweight, dy.new_empty(0) if bias_dtype is None else dy.new_empty(dy.shape[-1], dtype=bias_dtype)


input_gradient = register(
    "linear_input_gradient",
    "(Tensor dy, Tensor weight, str backend) -> Tensor",
    forward=_input_gradient,
    fake=lambda dy, weight, backend: dy.new_empty((*dy.shape[:-1], weight.shape[1])),
)

# bias_dtype None: no gradient of a bias. Without with_weight, x is not read.
weight_gradient = register(
    "linear_weight_gradient",
    "(Tensor dy, Tensor x, ScalarType? bias_dtype, bool with_weight, str backend) -> (Tensor, Tensor)",
    forward=_weight_gradient,
    fake=_weight_gradient_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.activation, _, ctx.backend = inputs
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    ctx.bias_dtype = bias.dtype if needs_bias else None
    ctx.save_for_backward(
        x if needs_weight else None, weight if needs_x else None, output[1] if ctx.activation else None
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy, _dpre):
    if dy is None:
        return (None,) * 7
    x, weight, pre = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    dx = dweight = dbias = None
    if needs_x or needs_weight or needs_bias:
        dz = activation_backward(dy, pre, ctx.activation, ctx.backend) if ctx.activation else dy
        if needs_x:
            dx = input_gradient(dz, weight, ctx.backend)
        if needs_weight or needs_bias:
            dweight, dbias = weight_gradient(dz, x if needs_weight else dz, ctx.bias_dtype, needs_weight, ctx.backend)
    return (
        dx,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        dy if needs_residual else None,
        None,
        None,
        None,
    )


_linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep, str backend)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """act(x W^T + bias) + residual.

    x (..., K), weight (N, K), bias (N,) or None, residual (..., N) or None -> (..., N); activation None, "gelu",
    "gelu_tanh", "relu_squared" or "silu". x, weight, residual of one floating dtype; bias of that dtype or fp32.
    Raises ValueError or TypeError on other shapes, dtypes, devices, names.
    """
    _check(x, weight, bias, activation, residual)
    chosen = resolve(_problem(x, weight, bias, activation=activation, residual=residual), backend)
    needs = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = activation is not None and needs and torch.is_grad_enabled()
    y, _ = _linear(x, weight, bias, residual, activation or "", keep, chosen)
    return y
