"""A linear layer with what usually follows it.

    y = act(x W^T + bias) + residual            act: none, gelu, gelu_tanh, relu_squared, silu (see activation.py)

Shapes: x (..., K), weight (N, K), bias (N,), residual and y (..., N). M = product of the leading dims.
Backward, with dz = dy act'(x W^T + bias):

    dx = dz W        dweight = dz^T x        dbias = sum of dz over rows        dresidual = dy

dx and dweight are separate ops, so that a collective on dx can run beside the product of dweight. Sums over M are
made in fp32. Saved for backward: weight if x needs a gradient, x if weight does, the pre-activation if there is an
activation. A weight in fp32 for narrower x is saved as it is and cast again in backward, so that no cast copy of every
weight of a model lives from forward to backward. Nothing crosses ranks.

dweight goes where the weight's `GradientTarget` says (gradients.py). Where a gradient of that dtype is there already
from an earlier micro-batch, dz^T x is added to it in place and no dweight is made. A gradient of x's own dtype is added
to in fp32 and rounded once. On CUDA the product of bf16 or fp16 operands goes into fp32 unrounded. No CPU library that
PyTorch calls offers that: there each micro-batch's product is rounded to x's dtype once, and the sum over micro-batches
is made in fp32. Our own kernel for CPUs with AMX does not round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakern.ops import autocast, checks
from megakern.ops.activation import KINDS, activation_backward, activation_reference
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve
from megakern.ops.gradients import GradientTarget, target_of


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


def launch(x, weight, bias, residual, activation, keep, backend):
    if backend != "torch":  # which has kernels that read fp32
        weight = weight.to(x.dtype)
    return launcher(backend, "linear", "linear_forward")(x, weight, bias, residual, activation, keep)


def _fake(x, weight, bias, residual, activation, keep, backend):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _input_gradient(dy, weight, added, backend):
    if backend != "torch":
        weight = weight.to(dy.dtype)
    return launcher(backend, "linear", "linear_input_gradient")(dy, weight, added)


def _weight_gradient(dy, x, weight_dtype, bias_dtype, backend):
    return launcher(backend, "linear", "linear_weight_gradient")(dy, x, weight_dtype, bias_dtype)


def _weight_gradient_fake(dy, x, weight_dtype, bias_dtype, backend):
    with_weight = weight_dtype is not None
    dweight = dy.new_empty((dy.shape[-1], x.shape[-1]) if with_weight else 0, dtype=weight_dtype or dy.dtype)
    return dweight, _bias_gradient_fake(dy, bias_dtype)


def _bias_gradient_fake(dy, dtype):
    return dy.new_empty(0) if dtype is None else dy.new_empty(dy.shape[-1], dtype=dtype)


def _accumulate(into, dy, x, bias_dtype, backend):
    return launcher(backend, "linear", "linear_accumulate_weight_gradient")(into, dy, x, bias_dtype)


input_gradient = register(
    "linear_input_gradient",
    "(Tensor dy, Tensor weight, Tensor? added, str backend) -> Tensor",
    forward=_input_gradient,
    fake=lambda dy, weight, added, backend: dy.new_empty((*dy.shape[:-1], weight.shape[1])),
)

# A dtype of None: that gradient is not wanted. Without that of the weight, x is not read.
weight_gradient = register(
    "linear_weight_gradient",
    "(Tensor dy, Tensor x, ScalarType? weight_dtype, ScalarType? bias_dtype, str backend) -> (Tensor, Tensor)",
    forward=_weight_gradient,
    fake=_weight_gradient_fake,
)

accumulate_weight_gradient = register(
    "linear_accumulate_weight_gradient",
    "(Tensor(a!) into, Tensor dy, Tensor x, ScalarType? bias_dtype, str backend) -> Tensor",
    forward=_accumulate,
    fake=lambda into, dy, x, bias_dtype, backend: _bias_gradient_fake(dy, bias_dtype),
)


def parameter_gradients(
    dz: torch.Tensor,
    x: torch.Tensor,
    target: GradientTarget | None,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dweight (N, K) and dbias (N,) of z = x W^T + b in their dtypes; None for a target or dtype of None.

    Every linear layer's gradients of parameters are made here. Where `target` has an accumulated gradient, dweight is
    added to it, and None is returned. x is read only where dweight is wanted. Both in one op: a kernel may sum dbias
    from what the product of dweight reads.
    """
    into = None if target is None else target.accumulated()
    dweight = dbias = None
    if into is not None:
        dbias = accumulate_weight_gradient(into, dz, x, bias_dtype, backend)
    elif target is not None:
        dweight, dbias = weight_gradient(dz, x, target.dtype, bias_dtype, backend)
    elif bias_dtype is not None:
        _, dbias = weight_gradient(dz, dz, None, bias_dtype, backend)
    return dweight, None if bias_dtype is None else dbias


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.activation, _, ctx.backend = inputs
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    ctx.target, ctx.bias_dtype = target_of(weight) if needs_weight else None, bias.dtype if needs_bias else None
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
            dx = input_gradient(dz, weight, None, ctx.backend)
        dweight, dbias = parameter_gradients(dz, x, ctx.target, ctx.bias_dtype, ctx.backend)
    return dx, dweight, dbias, dy if needs_residual else None, None, None, None


_linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep, str backend)"
    " -> (Tensor, Tensor)",
    forward=launch,
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
    low = autocast.autocast_dtype(x)
    if low is not None:
        x, weight, bias = x.to(low), *autocast.readable(low, weight, bias)
        if residual is not None and residual.dtype != low:
            return plus(linear(x, weight, bias, activation=activation, backend=backend), residual)
    _check(x, weight, bias, activation, residual)
    chosen = resolve(_problem(x, weight, bias, activation=activation, residual=residual), backend)
    needs = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = activation is not None and needs and torch.is_grad_enabled()
    y, _ = _linear(x, weight, bias, residual, activation or "", keep, chosen)
    return y


def plus(y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """y + residual of another dtype, under autocast, in the wider of both."""
    checks.floating("linear", residual=residual)
    checks.shape("linear", "residual", residual, tuple(y.shape), "(..., N) of the output")
    checks.same_device("linear", "x", y, "residual", residual)
    return y + residual


def chosen_backend(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None = None,
) -> str:
    """The backend that `linear` would take. Raises as `linear` does."""
    _check(x, weight, bias, activation, residual)
    return resolve(_problem(x, weight, bias, activation=activation, residual=residual))


def forward_pieces(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, *, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """y, the pre-activation (empty unless `keep`) and the backend's name: for autograd functions built around `linear`.

    Their backward calls `activation_backward`, `input_gradient` and `parameter_gradients` with that backend. Shapes,
    dtypes and errors are those of `linear`. To be called where no gradients are recorded.
    """
    chosen = chosen_backend(x, weight, bias, activation)
    y, pre = _linear(x, weight, bias, None, activation or "", keep, chosen)
    return y, pre, chosen
