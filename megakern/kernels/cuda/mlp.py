"""Launchers of csrc/linear.cu for the inner half of a feed-forward block: a gated product, and its gradient."""

from __future__ import annotations

from megakern.kernels.cuda import linear
from megakern.kernels.cuda.linear import operand
from megakern.kernels.cuda.linear_plan import GATED, NN
from megakern.kernels.memory import empty, empty_like, nothing


def linear_swiglu_forward(x, gate_weight, up_weight, gate_bias, up_bias, keep):
    """-> y (..., N), gate and up (..., N) if `keep`, else empty.

    A block multiplies a tile of x with a tile of each weight, read as they lie; the sums of both are then in the same
    threads.
    """
    N = gate_weight.shape[0]
    y = empty((*x.shape[:-1], N), x.dtype, x.device)
    gate, up = (empty_like(y) if keep else nothing(y) for _ in range(2))
    if y.numel():
        gate_bias, up_bias = (None if bias is None else operand(bias)[0] for bias in _pair(gate_bias, up_bias))
        kept = {"pre": gate, "pre_up": up} if keep else {}
        weights = operand(gate_weight), operand(up_weight)
        linear.product(
            GATED, operand(x), weights[0], y.view(-1, N), b_up=weights[1], bias=gate_bias, bias_up=up_bias, **kept
        )
    return y, gate, up


def _pair(first, second):
    """Both biases of one dtype, or none: one is zero where the other is alone."""
    if first is None and second is not None:
        return second.new_zeros(second.shape), second
    if second is None and first is not None:
        return first, first.new_zeros(first.shape)
    if first is not None and first.dtype != second.dtype:
        return first.float(), second.float()
    return first, second


def linear_activation_gradient(dy, weight, pre, up, activation):
    """-> dpre (..., K) = (dy W) act'(pre), dup empty; with `up` the gradients of silu(pre) up, both (..., K)."""
    dpre = empty(pre.shape, dy.dtype, dy.device)
    dup = nothing(dpre) if up is None else empty_like(dpre)
    if dpre.numel():
        K = weight.shape[1]
        gated = {} if up is None else {"saved_up": operand(up), "out_up": dup}
        kind = "" if gated else activation
        linear.product(NN, operand(dy), operand(weight), dpre.view(-1, K), saved=operand(pre), activation=kind, **gated)
    return dpre, dup
