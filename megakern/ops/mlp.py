"""The feed-forward half of a block: a gated linear layer, and layers whose gradients meet before the activation.

    linear_swiglu   y = silu(x Wg^T + bg) * (x Wu^T + bu)        one product of x with both weights; arXiv 2002.05202
    linear_activated, linear_after                               h = act(x W1^T + b1), y = h W2^T + b2 (+ residual)

Shapes: x (..., K), weights (N, K), biases (N,), y (..., N). Backward of the second pair, with z = x W1^T + b1:

    dz = (dy W2) act'(z)        one product, the derivative in its epilogue; swiglu: dgate and dup from the same product
    dW2 = dy^T h                dW1 = dz^T x, db1 = sum of dz, ...: those of `linear`

So dh, as wide as the inner layer, is never in memory. Autograd gives each op the gradient of its own output, which for
the first layer would be dh; here the first layer hands z on beside h (`Activated`), no gradient flows into h, and the
second layer returns that of z. One autograd function around both layers would do the same, but it would own what now
each layer decides for itself: its collectives, its adapter, where its weight's gradient goes. As two ops they compose
with tensor parallelism, recomputation and torch.compile as any two linear layers do.

Saved: x and W1 by the first; h, z (or gate and up) and W2 by the second. Nothing crosses ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megakern.ops import autocast, checks
from megakern.ops.activation import KINDS, swiglu_backward
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve
from megakern.ops.gradients import target_of
from megakern.ops.linear import (
    chosen_backend,
    forward_pieces,
    input_gradient,
    launch,
    linear,
    parameter_gradients,
    plus,
)


class Activated(NamedTuple):
    """The output of a layer with an activation, for one linear layer to read whose gradient goes to the input of it."""

    value: torch.Tensor
    """act(pre), or silu(pre) * up; no gradient flows into it."""
    pre: torch.Tensor | None
    """The activation's input, or that of the gate; None where no gradients are recorded."""
    up: torch.Tensor | None
    """Of activation "swiglu" alone."""
    activation: str


def linear_swiglu_reference(x, gate_weight, up_weight, gate_bias=None, up_bias=None):
    gate, up = (
        F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for weight, bias in ((gate_weight, gate_bias), (up_weight, up_bias))
    )
    return F.silu(gate) * up


@describes("linear_swiglu")
def _problem(x, gate_weight, up_weight, gate_bias=None, up_bias=None) -> Problem:
    N, K = gate_weight.shape
    options = {"bias": gate_bias is not None or up_bias is not None}
    return Problem("linear_swiglu", x.device.type, x.dtype, {"M": x.numel() // K if K else 0, "N": N, "K": K}, options)


def _check(x, gate_weight, up_weight, gate_bias, up_bias) -> None:
    if gate_weight.ndim != 2 or 0 in gate_weight.shape:
        raise ValueError(
            f"linear_swiglu: gate_weight must have shape (N, K) with N, K > 0, got {tuple(gate_weight.shape)}"
        )
    N, K = gate_weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(
            f"linear_swiglu: x must have shape (..., K) with K = {K} of gate_weight (N, K), got {tuple(x.shape)}; "
            f"weights are (out, in), as in torch.nn.Linear"
        )
    checks.shape("linear_swiglu", "up_weight", up_weight, (N, K), "(N, K) of gate_weight")
    checks.floating("linear_swiglu", x=x)
    others = {"gate_weight": gate_weight, "up_weight": up_weight, "gate_bias": gate_bias, "up_bias": up_bias}
    checks.same_or_fp32("linear_swiglu", "x", x, **others)
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            checks.shape("linear_swiglu", name, bias, (N,), "(N,)", "pass one bias for each row of its weight")


# --- custom ops. What is not kept is an empty tensor. ---


def _swiglu_forward(x, gate_weight, up_weight, gate_bias, up_bias, keep, backend):
    if backend != "torch":  # which has kernels that read fp32
        gate_weight, up_weight = gate_weight.to(x.dtype), up_weight.to(x.dtype)
    compute = launcher(backend, "mlp", "linear_swiglu_forward")
    return compute(x, gate_weight, up_weight, gate_bias, up_bias, keep)


def _swiglu_fake(x, gate_weight, up_weight, gate_bias, up_bias, keep, backend):
    y = x.new_empty((*x.shape[:-1], gate_weight.shape[0]))
    return y, *(torch.empty_like(y) if keep else x.new_empty(0) for _ in range(2))


def _swiglu_setup_context(ctx, inputs, output):
    x, gate_weight, up_weight, gate_bias, up_bias, _, ctx.backend = inputs
    needs = ctx.needs_input_grad
    ctx.targets = [target_of(w) if n else None for w, n in zip((gate_weight, up_weight), needs[1:3], strict=True)]
    ctx.bias_dtypes = [b.dtype if n else None for b, n in zip((gate_bias, up_bias), needs[3:5], strict=True)]
    weights = (gate_weight, up_weight) if needs[0] else (None, None)
    ctx.save_for_backward(x if any(needs[1:3]) else None, *weights, *output[1:])
    ctx.set_materialize_grads(False)


def _swiglu_open_context(ctx, inputs, output):
    _swiglu_setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(output[0])


def _swiglu_closed_context(ctx, inputs, output):
    _swiglu_setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _swiglu_backward(ctx, dy, dgate, dup):
    """From dy, or from the gradients of gate and up."""
    x, gate_weight, up_weight, gate, up = ctx.saved_tensors
    if dy is not None:
        dgate, dup = swiglu_backward(dy, gate, up, ctx.backend)
    dx, dweights, dbiases = None, [None, None], [None, None]
    for i, (dz, weight) in enumerate(((dgate, gate_weight), (dup, up_weight))):
        if dz is not None:
            if ctx.needs_input_grad[0]:
                dx = input_gradient(dz, weight, dx, ctx.backend)
            found = parameter_gradients(dz, x, ctx.targets[i], ctx.bias_dtypes[i], ctx.backend)
            dweights[i], dbiases[i] = found
    return dx, *dweights, *dbiases, None, None


_SWIGLU = (
    "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_linear_swiglu = register(
    "linear_swiglu",
    _SWIGLU,
    forward=_swiglu_forward,
    fake=_swiglu_fake,
    setup_context=_swiglu_closed_context,
    backward=_swiglu_backward,
)
# The same, whose gradients come to gate and up.
_linear_swiglu_open = register(
    "linear_swiglu_open",
    _SWIGLU,
    forward=_swiglu_forward,
    fake=_swiglu_fake,
    setup_context=_swiglu_open_context,
    backward=_swiglu_backward,
)


def _activated_setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.backend = inputs
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    ctx.target, ctx.bias_dtype = target_of(weight) if needs_weight else None, bias.dtype if needs_bias else None
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _activated_backward(ctx, _dy, dz):
    if dz is None:
        return (None,) * 5
    x, weight = ctx.saved_tensors
    dx = input_gradient(dz, weight, None, ctx.backend) if ctx.needs_input_grad[0] else None
    return dx, *parameter_gradients(dz, x, ctx.target, ctx.bias_dtype, ctx.backend), None, None


def _activated_forward(x, weight, bias, activation, backend):
    return launch(x, weight, bias, None, activation, True, backend)


def _activated_fake(x, weight, bias, activation, backend):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y)


_linear_activated = register(
    "linear_activated",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, str backend) -> (Tensor, Tensor)",
    forward=_activated_forward,
    fake=_activated_fake,
    setup_context=_activated_setup_context,
    backward=_activated_backward,
)


def _activation_gradient(dy, weight, pre, up, activation, backend):
    if backend != "torch":
        weight = weight.to(dy.dtype)
    return launcher(backend, "mlp", "linear_activation_gradient")(dy, weight, pre, up, activation)


def _activation_gradient_fake(dy, weight, pre, up, activation, backend):
    dpre = torch.empty_like(pre, memory_format=torch.contiguous_format)
    return dpre, dpre.new_empty(0) if up is None else torch.empty_like(dpre)


# (dy W) act'(pre), or with `up` the gradients of silu(pre) * up.
activation_gradient = register(
    "linear_activation_gradient",
    "(Tensor dy, Tensor weight, Tensor pre, Tensor? up, str activation, str backend) -> (Tensor, Tensor)",
    forward=_activation_gradient,
    fake=_activation_gradient_fake,
)


def gradients_before(
    dy: torch.Tensor, weight: torch.Tensor, pres: tuple[torch.Tensor, ...], activation: str, backend: str
) -> tuple[torch.Tensor, ...]:
    """The gradient of each of an Activated's inputs, from that of the layer that read it."""
    up = pres[1] if len(pres) > 1 else None
    return activation_gradient(dy, weight, pres[0], up, activation, backend)[: len(pres)]


def _after_setup_context(ctx, inputs, output):
    value, pre, up, weight, bias, _, ctx.activation, ctx.backend = inputs
    needs_pre, _, needs_weight, needs_bias = ctx.needs_input_grad[1:5]
    ctx.target, ctx.bias_dtype = target_of(weight) if needs_weight else None, bias.dtype if needs_bias else None
    saved = (weight, pre, up) if needs_pre else (None, None, None)
    ctx.save_for_backward(value if needs_weight else None, *saved)


def _after_backward(ctx, dy):
    value, weight, pre, up = ctx.saved_tensors
    pres = () if pre is None else (pre,) if up is None else (pre, up)
    dpres = gradients_before(dy, weight, pres, ctx.activation, ctx.backend) if pres else ()
    dweight, dbias = parameter_gradients(dy, value, ctx.target, ctx.bias_dtype, ctx.backend)
    dpre, dup = (*dpres, None, None)[:2]
    return None, dpre, dup, dweight, dbias, dy if ctx.needs_input_grad[5] else None, None, None


def _after_forward(value, pre, up, weight, bias, residual, activation, backend):
    return launch(value, weight, bias, residual, "", False, backend)[0]


_linear_after = register(
    "linear_after",
    "(Tensor value, Tensor pre, Tensor? up, Tensor weight, Tensor? bias, Tensor? residual, str activation, str backend)"
    " -> Tensor",
    forward=_after_forward,
    fake=lambda value, pre, up, weight, bias, *more: value.new_empty((*value.shape[:-1], weight.shape[0])),
    setup_context=_after_setup_context,
    backward=_after_backward,
)


# --- functions ---


def _recording(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def swiglu_backend(x, gate_weight, up_weight, gate_bias=None, up_bias=None, backend: str | None = None) -> str:
    """The backend that `linear_swiglu` would take. Raises as `linear_swiglu` does."""
    _check(x, gate_weight, up_weight, gate_bias, up_bias)
    return resolve(_problem(x, gate_weight, up_weight, gate_bias, up_bias), backend)


def linear_swiglu(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """silu(x gate_weight^T + gate_bias) * (x up_weight^T + up_bias).

    x (..., K), weights (N, K), biases (N,) or None -> (..., N). Weights and biases of x's dtype or fp32 (cast to x's
    for the product, with fp32 gradients). Raises ValueError or TypeError on other shapes, dtypes, devices.
    """
    arguments = x, gate_weight, up_weight, gate_bias, up_bias
    low = autocast.autocast_dtype(x)
    if low is not None:
        arguments = x.to(low), *autocast.readable(low, *arguments[1:])
    chosen = swiglu_backend(*arguments, backend)
    return _linear_swiglu(*arguments, _recording(*arguments), chosen)[0]


def open_pieces(
    x: torch.Tensor, parameters: list[tuple[torch.Tensor, torch.Tensor | None]], activation: str, *, keep: bool
) -> tuple[tuple[torch.Tensor, ...], str]:
    """(value, pre) of one (weight, bias), or (value, gate, up) of two and activation "swiglu"; the backend's name.

    Without `keep` all but the value are empty. Autograd functions around it call this where no gradients are recorded;
    elsewhere gradients come to all but the value.
    """
    if activation == "swiglu":
        (gate_weight, gate_bias), (up_weight, up_bias) = parameters
        arguments = x, gate_weight, up_weight, gate_bias, up_bias
        chosen = swiglu_backend(*arguments)
        return (_linear_swiglu_open if keep else _linear_swiglu)(*arguments, keep, chosen), chosen
    ((weight, bias),) = parameters
    if not keep:
        value, none, chosen = forward_pieces(x, weight, bias, activation, keep=False)
        return (value, none), chosen
    chosen = chosen_backend(x, weight, bias, activation)
    return _linear_activated(x, weight, bias, activation, chosen), chosen


def linear_activated(
    x: torch.Tensor, parameters: list[tuple[torch.Tensor, torch.Tensor | None]], activation: str
) -> Activated:
    """act(x W^T + b) of one (W, b), or for "swiglu" of two, those of gate and up, for `linear_after` to read."""
    x, parameters = autocast_layers(x, parameters)
    keep = _recording(x, *(tensor for pair in parameters for tensor in pair))
    outputs, _ = open_pieces(x, parameters, activation, keep=keep)
    return activated(outputs, activation) if keep else Activated(outputs[0], None, None, activation)


def autocast_layers(
    x: torch.Tensor, parameters: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """x and the (weight, bias) of layers that read it, as autocast wants them; elsewhere as they are."""
    low = autocast.autocast_dtype(x)
    if low is None:
        return x, parameters
    return x.to(low), [tuple(autocast.readable(low, *pair)) for pair in parameters]


def activated(outputs: tuple[torch.Tensor, ...], activation: str) -> Activated:
    """Of (value, pre) or (value, gate, up)."""
    return Activated(outputs[0], outputs[1], outputs[2] if len(outputs) > 2 else None, activation)


def linear_after(
    x: torch.Tensor | Activated,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias + residual, as `linear`; the gradient of an `Activated` is that of its activation's inputs."""
    if not isinstance(x, Activated):
        return linear(x, weight, bias, residual=residual)
    if x.pre is None:
        return linear(x.value, weight, bias, residual=residual)
    if x.activation not in (*KINDS, "swiglu") or (x.up is not None) != (x.activation == "swiglu"):
        raise ValueError(f"linear_after: up goes with activation 'swiglu' and no other, got {x.activation!r}")
    if autocast.autocast_dtype(x.value) is not None:
        weight, bias = autocast.readable(x.value.dtype, weight, bias)
        if residual is not None and residual.dtype != x.value.dtype:
            return plus(linear_after(x, weight, bias), residual)
    chosen = chosen_backend(x.value, weight, bias, None, residual)
    return _linear_after(x.value, x.pre, x.up, weight, bias, residual, x.activation, chosen)
