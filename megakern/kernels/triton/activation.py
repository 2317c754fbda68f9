"""Activations and SwiGLU in Triton, elementwise in fp32; each output is written whole (=), each tensor read once.

`activate` and `slope` are also the epilogues of `linear.py`. The backward pass computes the activation again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakern.kernels.memory import empty_like, tiles_of
from megakern.kernels.triton import configs
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _gelu_tanh_sigmoid(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation; u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x), x fp32. NaN stays NaN."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * _gelu_tanh_sigmoid(x)
    elif KIND == "relu_squared":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(KIND == "silu")
        return x * tl.sigmoid(x)


@triton.jit
def slope(x, KIND: tl.constexpr):
    """act'(x), x fp32."""
    if KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        share = _gelu_tanh_sigmoid(x)
        return share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu_squared":
        return tl.where(x < 0.0, 0.0, 2.0 * x)
    else:
        tl.static_assert(KIND == "silu")
        share = tl.sigmoid(x)
        return share * (1.0 + x * (1.0 - share))


@triton.jit
def tile(M, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows (ROWS, 1) and columns (1, COLS), both int64, and which elements exist; row-major order."""
    across = tl.cdiv(C, COLS)
    program = tl.program_id(0)
    rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % across).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    return rows, cols, (rows < M) & (cols < C)


@triton.jit
def _activation_forward(x, y, M, C, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Program i: tile i of y."""
    rows, cols, mask = tile(M, C, ROWS, COLS)
    value = tl.load(x + rows * x_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(y + rows * C + cols, activate(value, KIND).to(y.dtype.element_ty), mask)


@triton.jit
def _activation_backward(
    dy, x, dx, M, C, dy_stride, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Program i: tile i of dx."""
    rows, cols, mask = tile(M, C, ROWS, COLS)
    value = tl.load(x + rows * x_stride + cols, mask, 0.0).to(tl.float32)
    gradient = tl.load(dy + rows * dy_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(dx + rows * C + cols, (gradient * slope(value, KIND)).to(dx.dtype.element_ty), mask)


@triton.jit
def _swiglu_forward(gate, up, y, M, C, gate_stride, up_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Program i: tile i of y."""
    rows, cols, mask = tile(M, C, ROWS, COLS)
    value = activate(tl.load(gate + rows * gate_stride + cols, mask, 0.0).to(tl.float32), "silu")
    value *= tl.load(up + rows * up_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(y + rows * C + cols, value.to(y.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward(
    dy, gate, up, dgate, dup, M, C, dy_stride, gate_stride, up_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Program i: tile i of dgate and dup."""
    rows, cols, mask = tile(M, C, ROWS, COLS)
    gradient = tl.load(dy + rows * dy_stride + cols, mask, 0.0).to(tl.float32)
    value = tl.load(gate + rows * gate_stride + cols, mask, 0.0).to(tl.float32)
    factor = tl.load(up + rows * up_stride + cols, mask, 0.0).to(tl.float32)
    tl.store(dup + rows * C + cols, (gradient * activate(value, "silu")).to(dup.dtype.element_ty), mask)
    tl.store(dgate + rows * C + cols, (gradient * factor * slope(value, "silu")).to(dgate.dtype.element_ty), mask)


# --- launchers ---


def _launch(kernel, inputs, outputs, **constants):
    """Elementwise: inputs of one shape at any strides, outputs contiguous and of that shape."""
    inputs, M, C = tiles_of(*inputs)
    config = configs.elementwise(C)
    strides = [x.stride(0) for x in inputs]
    launch(kernel, (configs.tile_count(M, C, config),), *inputs, *outputs, M, C, *strides, config=config, **constants)


def activation_forward(x, kind):
    """-> y, contiguous, like x."""
    y = empty_like(x)
    _launch(_activation_forward, [x], [y], KIND=kind)
    return y


def activation_backward(dy, x, kind):
    """-> dx = dy act'(x), contiguous, like x."""
    dx = empty_like(x)
    _launch(_activation_backward, [dy, x], [dx], KIND=kind)
    return dx


def swiglu_forward(gate, up):
    """-> silu(gate) up, contiguous."""
    y = empty_like(gate)
    _launch(_swiglu_forward, [gate, up], [y])
    return y


def swiglu_backward(dy, gate, up):
    """-> dgate, dup, contiguous."""
    dgate, dup = empty_like(gate), empty_like(up)
    _launch(_swiglu_backward, [dy, gate, up], [dgate, dup])
    return dgate, dup
