"""The inner half of a feed-forward block in Triton: products of linear.py, and what is between them.

The gradient of an activation's input is one product with the derivative in its epilogue. SwiGLU is not: two weights
need two sums of each output, so tiles half as wide as those of the tuned table, which read x more often, and in
training both pre-activations are written in any case. Whether narrower tiles would win is not yet measured.
"""

from __future__ import annotations

from megakern.kernels.memory import empty, nothing, rows_of
from megakern.kernels.triton.activation import swiglu_backward, swiglu_forward
from megakern.kernels.triton.linear import linear_forward, linear_input_gradient, product


def linear_swiglu_forward(x, gate_weight, up_weight, gate_bias, up_bias, keep):
    """-> y (..., N), gate and up (..., N) if `keep`, else empty."""
    gate, _ = linear_forward(x, gate_weight, gate_bias, None, "", False)
    up, _ = linear_forward(x, up_weight, up_bias, None, "", False)
    y = swiglu_forward(gate, up)
    return (y, gate, up) if keep else (y, nothing(y), nothing(y))


def linear_activation_gradient(dy, weight, pre, up, activation):
    """-> dpre (..., K) = (dy W) act'(pre), dup empty; with `up` the gradients of silu(pre) up, both (..., K)."""
    if up is not None:
        return swiglu_backward(linear_input_gradient(dy, weight, None), pre, up)
    dpre = empty(pre.shape, dy.dtype, dy.device)
    out = dpre.view(-1, weight.shape[1])
    product(rows_of(dy), rows_of(weight), out, residual=rows_of(pre), activation=activation, gradient=True)
    return dpre, nothing(dy)
