"""Launchers of csrc/activation.cu: activations and SwiGLU, elementwise in fp32."""

from __future__ import annotations

from megakern.kernels.cuda.module import DTYPES, call, rows_of
from megakern.kernels.memory import empty_like

KINDS = {"gelu": 0, "gelu_tanh": 1, "relu_squared": 2, "silu": 3}
"""enum Activation of csrc/api.h."""


def activation_forward(x, kind):
    """-> y, contiguous, like x."""
    y = empty_like(x)
    (x,), M, C, strides = rows_of(x)
    call("activation_forward", x, x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], KINDS[kind], M, C, *strides)
    return y


def activation_backward(dy, x, kind):
    """-> dx = dy act'(x), contiguous, like x."""
    dx = empty_like(x)
    (dy, x), M, C, strides = rows_of(dy, x)
    pointers = dy.data_ptr(), x.data_ptr(), dx.data_ptr()
    call("activation_backward", x, *pointers, DTYPES[x.dtype], KINDS[kind], M, C, *strides)
    return dx


def swiglu_forward(gate, up):
    """-> silu(gate) up, contiguous."""
    y = empty_like(gate)
    (gate, up), M, C, strides = rows_of(gate, up)
    call("swiglu_forward", y, gate.data_ptr(), up.data_ptr(), y.data_ptr(), DTYPES[y.dtype], M, C, *strides)
    return y


def swiglu_backward(dy, gate, up):
    """-> dgate, dup, contiguous."""
    dgate, dup = empty_like(gate), empty_like(up)
    inputs, M, C, strides = rows_of(dy, gate, up)
    pointers = [x.data_ptr() for x in (*inputs, dgate, dup)]
    call("swiglu_backward", dgate, *pointers, DTYPES[dgate.dtype], M, C, *strides)
    return dgate, dup
