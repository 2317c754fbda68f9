"""A linear layer with what usually follows it.

    y = act(x W^T + bias) + residual            act: none, gelu, gelu_tanh, relu_squared, silu (see activation.py)

Shapes: x (..., K), weight (N, K), bias (N,), residual and y (..., N). M = product of the leading dims.
Backward, with dz = dy act'(x W^T + bias):

    dx = dz W        dweight = dz^T x        dbias = sum of dz over rows        dresidual = dy

dx and dweight are separate ops, so that a collective on dx can run beside the product of dweight. Sums over M are
made in fp32. Saved for backward: weight if x needs a gradient, x if weight does, the pre-activation if there is an
activation. A weight in fp32 for narrower x is saved as it is and cast again in backward, so that no cast copy of every
weight of a model lives from forward to backward. Nothing crosses ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakern.ops import checks
from megakern.ops.activation import KINDS, activation_backward, activation_reference
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve


def linear_reference(x, weight, bias=None, *, activation=None, residual=None):
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
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
    checks.floating("linear", x=x, residual=residual)
    checks.same_or_fp32("linear", "x", x, weight=weight, bias=bias)
    if bias is not None:
        checks.shape("linear", "bias", bias, (weight.shape[0],), "(N,)", "pass one bias for each row of weight")
    if residual is not None:
        checks.shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]), "(..., N) of the output")


# --- custom ops. The pre-activation is an empty tensor where it is not kept. ---


def _forward(x, weight, bias, residual, activation, keep, backend):
    return launcher(backend, "linear", "linear_forward")(x, weight.to(x.dtype), bias, residual, activation, keep)


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


def parameter_gradients(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dweight (N, K) and dbias (N,) of z = x W^T + b in the given dtypes, None for a dtype of None.

    Every linear layer's gradients of parameters are made here. x is read only where dweight is wanted.
    """
    if weight_dtype is None and bias_dtype is None:
        return None, None
    with_weight = weight_dtype is not None
    dweight, dbias = weight_gradient(dz, x if with_weight else dz, bias_dtype, with_weight, backend)
    return dweight.to(weight_dtype) if with_weight else None, dbias if bias_dtype is not None else None


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.activation, _, ctx.backend = inputs
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype if needs_weight else None, bias.dtype if needs_bias else None
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
            dx = input_gradient(dz, weight.to(dz.dtype), ctx.backend)
        dweight, dbias = parameter_gradients(dz, x, ctx.weight_dtype, ctx.bias_dtype, ctx.backend)
    return dx, dweight, dbias, dy if needs_residual else None, None, None, None


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
    "gelu_tanh", "relu_squared" or "silu". x and residual of one floating dtype; weight and bias of that dtype or fp32
    (cast to x's for the product, with fp32 gradients).
    Raises ValueError or TypeError on other shapes, dtypes, devices, names.
    """
    _check(x, weight, bias, activation, residual)
    chosen = resolve(_problem(x, weight, bias, activation=activation, residual=residual), backend)
    needs = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = activation is not None and needs and torch.is_grad_enabled()
    y, _ = _linear(x, weight, bias, residual, activation or "", keep, chosen)
    return y


def forward_pieces(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """y, the pre-activation (empty unless `keep`) and the backend's name: for autograd functions built around `linear`.

    Their backward calls `activation_backward`, `input_gradient` and `parameter_gradients` with that backend. Shapes,
    dtypes and errors are those of `linear`. To be called where no gradients are recorded.
    """
    _check(x, weight, bias, activation, None)
    chosen = resolve(_problem(x, weight, bias, activation=activation))
    y, pre = _linear(x, weight, bias, None, activation or "", keep, chosen)
    return y, pre, chosen
