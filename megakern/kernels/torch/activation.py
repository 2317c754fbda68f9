"""Activations for any device, from ATen's elementwise kernels, which compute bf16 and fp16 in fp32.

On CPUs the C++ kernels come first. Backward of (3072, 1536) on two Zen 4 cores, ms, bf16 | fp32: gelu 1.5 | 2.0 (ATen
2.2 | 4.4), gelu_tanh 1.3 | 1.8 (4.7 | 5.8), silu 1.1 | 1.7 (1.6 | 1.7), relu_squared 0.5 | 0.9 (1.2 | 1.5).

Written out as cache-sized chunks of plain arithmetic, gelu_tanh was not faster than ATen (12.7 against 12.8 ms forward,
21 against 22 ms backward, fp32, 3072 x 1536, one Xeon core), so there is one call an activation here.
"""

from __future__ import annotations

import torch

from megakern.kernels.torch import native

_aten = torch.ops.aten


def activation_forward(x, kind, into=None):
    """-> y, contiguous, like x. With `into` (which may be x), y is written there."""
    if into is None:
        into = torch.empty_like(x, memory_format=torch.contiguous_format)
    if native.takes(x, into):
        return native.activation_forward(x, kind, into)
    if kind == "gelu":
        return _aten.gelu.out(x, approximate="none", out=into)
    if kind == "gelu_tanh":
        return _aten.gelu.out(x, approximate="tanh", out=into)
    if kind == "silu":
        return _aten.silu.out(x, out=into)
    return torch.clamp(x, min=0, out=into).square_()  # relu_squared; clamp keeps NaN, as relu does


def activation_backward(dy, x, kind):
    """-> dx = dy act'(x), contiguous, like x."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if native.takes(dy, x):
        return native.activation_backward(dy, x, kind, dx)
    if kind == "gelu":
        return _aten.gelu_backward.grad_input(dy, x, approximate="none", grad_input=dx)
    if kind == "gelu_tanh":
        return _aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dx)
    if kind == "silu":
        return _aten.silu_backward.grad_input(dy, x, grad_input=dx)
    return torch.clamp(x, min=0, out=dx).mul_(dy).mul_(2)


def swiglu_forward(gate, up):
    """-> silu(gate) up, contiguous."""
    return activation_forward(gate, "silu").mul_(up)


def swiglu_backward(dy, gate, up):
    """-> dgate, dup, contiguous."""
    dup = activation_forward(gate, "silu").mul_(dy)
    dgate = torch.mul(dy, up, out=torch.empty_like(dup))
    return _aten.silu_backward.grad_input(dgate, gate, grad_input=dgate), dup
