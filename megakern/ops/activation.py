"""Elementwise activations, and SwiGLU, the gated one.

    gelu          y = x Phi(x), Phi the normal distribution function     Hendrycks and Gimpel 2016, arXiv 1606.08415
    gelu_tanh     y = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2    the same paper's approximation
    relu_squared  y = max(x, 0)^2                                        So et al. 2021, arXiv 2109.08668
    silu          y = x / (1 + exp(-x))
    swiglu        y = silu(gate) up                                      Shazeer 2020, arXiv 2002.05202

Shapes: any; y is contiguous. bf16 and fp16 are computed in fp32. Saved for backward: the inputs. Nothing crosses ranks.
`linear` applies the same formulas to its output (KINDS), through the same launchers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakern.ops import autocast, checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve

KINDS = ("gelu", "gelu_tanh", "relu_squared", "silu")


def activation_reference(x, kind):
    if kind == "relu_squared":
        return F.relu(x).square()
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def gelu_reference(x, *, approximate="none"):
    return F.gelu(x, approximate=approximate)


def swiglu_reference(gate, up):
    return F.silu(gate) * up


@describes("gelu")
def _gelu_problem(x, *, approximate="none") -> Problem:
    return Problem("gelu", x.device.type, x.dtype, {"elements": x.numel()}, {"approximate": approximate})


@describes("swiglu")
def _swiglu_problem(gate, up) -> Problem:
    return Problem("swiglu", gate.device.type, gate.dtype, {"elements": gate.numel()})


# --- custom ops ---


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(x, kind, backend):
    return launcher(backend, "activation", "activation_forward")(x, kind)


def _backward(dy, x, kind, backend):
    return launcher(backend, "activation", "activation_backward")(dy, x, kind)


# Also called by the backward of `linear`, with its pre-activation as x.
activation_backward = register(
    "activation_backward",
    "(Tensor dy, Tensor x, str kind, str backend) -> Tensor",
    forward=_backward,
    fake=lambda dy, x, kind, backend: _like(x),
)


def _setup_context(ctx, inputs, output):
    x, ctx.kind, ctx.backend = inputs
    ctx.save_for_backward(x)


def _autograd_backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return activation_backward(dy, x, ctx.kind, ctx.backend), None, None


_activation = register(
    "activation",
    "(Tensor x, str kind, str backend) -> Tensor",
    forward=_forward,
    fake=lambda x, kind, backend: _like(x),
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _swiglu_forward(gate, up, backend):
    return launcher(backend, "activation", "swiglu_forward")(gate, up)


def _swiglu_backward_forward(dy, gate, up, backend):
    return launcher(backend, "activation", "swiglu_backward")(dy, gate, up)


# Also called by the backward of `linear_swiglu`.
swiglu_backward = register(
    "swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)",
    forward=_swiglu_backward_forward,
    fake=lambda dy, gate, up, backend: (_like(gate), _like(up)),
)


def _swiglu_setup_context(ctx, inputs, output):
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _swiglu_autograd_backward(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = swiglu_backward(dy, gate, up, ctx.backend)
    return dgate, dup, None


_swiglu = register(
    "swiglu",
    "(Tensor gate, Tensor up, str backend) -> Tensor",
    forward=_swiglu_forward,
    fake=lambda gate, up, backend: _like(gate),
    setup_context=_swiglu_setup_context,
    backward=_swiglu_autograd_backward,
)


# --- public functions ---


def gelu(x: torch.Tensor, *, approximate: str = "none", backend: str | None = None) -> torch.Tensor:
    """GELU of each element: exact (`approximate="none"`) or by tanh (`approximate="tanh"`).

    x of any shape and floating dtype; y is like x, contiguous. Raises TypeError on another dtype, ValueError on another
    `approximate`.
    """
    checks.floating("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    chosen = resolve(_gelu_problem(x, approximate=approximate), backend)
    return _activation(x, "gelu_tanh" if approximate == "tanh" else "gelu", chosen)


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation "gelu", "gelu_tanh", "relu_squared" or "silu" of each element, which `linear` has built in."""
    return _activation(x, kind, resolve(_gelu_problem(x)))


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * up.

    gate and up of one shape and floating dtype; they may be strided halves of one tensor. Returns y of their shape,
    contiguous. Raises TypeError or ValueError when dtypes, devices or shapes differ.
    """
    gate, up = autocast.alike(gate, up)
    checks.floating("swiglu", gate=gate, up=up)
    checks.shape("swiglu", "up", up, tuple(gate.shape), "of gate", "pass the two halves of the same projection")
    return _swiglu(gate, up, resolve(_swiglu_problem(gate, up), backend))
