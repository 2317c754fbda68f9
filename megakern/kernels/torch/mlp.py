"""The inner half of a feed-forward block for any device: matrix products and the elementwise kernels between them."""

from __future__ import annotations

from megakern.kernels.torch import native
from megakern.kernels.torch.activation import activation_backward, swiglu_backward, swiglu_forward
from megakern.kernels.torch.linear import linear_forward, linear_input_gradient


def linear_swiglu_forward(x, gate_weight, up_weight, gate_bias, up_bias, keep):
    """-> y (..., N), gate and up (..., N) if `keep`, else empty. Weights may be fp32."""
    gate, _ = linear_forward(x, gate_weight, gate_bias, None, "", False)
    up, _ = linear_forward(x, up_weight, up_bias, None, "", False)
    y = swiglu_forward(gate, up)
    return (y, gate, up) if keep else (y, x.new_empty(0), x.new_empty(0))


def linear_activation_gradient(dy, weight, pre, up, activation):
    """-> dpre (..., K) = (dy W) act'(pre), dup empty; with `up` the gradients of silu(pre) up, both (..., K)."""
    rows, read = dy.reshape(-1, dy.shape[-1]), pre.reshape(-1, pre.shape[-1])
    if up is None and native.takes_product(rows, weight, read, activation, transposed=True):
        dpre = rows.new_empty(read.shape)
        native.product(rows, weight, None, None, activation, dpre, read.contiguous(), transposed=True, derivative=True)
        return dpre.view(pre.shape), dpre.new_empty(0)
    dx = linear_input_gradient(dy, weight, None)
    if up is not None:
        return swiglu_backward(dx, pre, up)
    return activation_backward(dx, pre, activation), dx.new_empty(0)
