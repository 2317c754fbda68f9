"""Column- and row-parallel linear layers as autograd functions whose collectives run beside their matrix products.

Letters: K in, N out, R ranks, T tokens, s = T/R under sequence parallelism and T without. What one call does, in order
(arXiv 2205.05198, section 4.2; a collective is started, the line below it computed, then it is waited for):

    column, forward    sequence: all-gather x            y = act(x W^T + b), for each weight that reads this x
    column, backward   sequence: start all-gather x      dz = dy act'(z); dx = sum of dz W
                       start reduce-scatter dx (sequence) or all-reduce dx
                                                         dW = dz^T x, db = sum of dz
    row, forward       y = x W^T                         reduce-scatter y (sequence) or all-reduce y
    row, backward      sequence: all-gather dy           dx = dy W, dW = dy^T x

Saved: of the column-parallel layer the sharded x (..., s, K), the weights as they are and the pre-activations; of the
row-parallel layer x (..., T, K/R) and the weight. Weights may be fp32 for narrower x: they are cast when they are read,
in forward and in backward, so that no cast copy lives between the two.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megakern.ops.activation import activation_backward
from megakern.ops.gradients import target_of
from megakern.ops.linear import forward_pieces, input_gradient, linear, parameter_gradients
from megakern.parallel.collectives import (
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megakern.parallel.region import TensorRegion


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, sequence, activation, *parameters):
        weights, biases = parameters[0::2], parameters[1::2]
        ctx.group, ctx.sequence, ctx.activation = group, sequence, activation
        ctx.targets = [target_of(weight) for weight in weights]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        whole = start_gather_sequence(x, group).wait() if sequence else x
        outputs, pres = [], []
        for weight, bias in zip(weights, biases, strict=True):
            y, pre, ctx.backend = forward_pieces(whole, weight, bias, activation, keep=activation is not None)
            outputs.append(y)
            pres.append(pre)
        ctx.save_for_backward(x, *weights, *(pres if activation else ()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *rest = ctx.saved_tensors
        weights, pres = rest[: len(dys)], rest[len(dys) :]
        needs = ctx.needs_input_grad
        needs_x, needs_weights, needs_biases = needs[0], needs[4::2], needs[5::2]
        arriving = start_gather_sequence(x, ctx.group) if ctx.sequence and any(needs_weights) else None
        if ctx.activation:
            dys = [activation_backward(dy, z, ctx.activation, ctx.backend) for dy, z in zip(dys, pres, strict=True)]
        dx = None
        if needs_x:
            for dz, weight in zip(dys, weights, strict=True):
                part = input_gradient(dz, weight.to(dz.dtype), ctx.backend)
                dx = part if dx is None else dx.add_(part)
        x = arriving.wait() if arriving is not None else x
        leaving = None
        if needs_x:
            leaving = (start_reduce_scatter_sequence if ctx.sequence else start_all_reduce)(dx, ctx.group)
        gradients = []
        for i, dz in enumerate(dys):
            target = ctx.targets[i] if needs_weights[i] else None
            bias_dtype = ctx.bias_dtypes[i] if needs_biases[i] else None
            gradients += parameter_gradients(dz, x, target, bias_dtype, ctx.backend)
        return leaving.wait() if leaving is not None else None, None, None, None, *gradients


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, sequence):
        ctx.group, ctx.sequence, ctx.target = group, sequence, target_of(weight)
        y, _, ctx.backend = forward_pieces(x, weight, None, None, keep=False)
        ctx.save_for_backward(x, weight)
        return (start_reduce_scatter_sequence if sequence else start_all_reduce)(y, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dy = start_gather_sequence(dy, ctx.group).wait() if ctx.sequence else dy
        dx = input_gradient(dy, weight.to(dy.dtype), ctx.backend) if needs_x else None
        dweight, _ = parameter_gradients(dy, x, ctx.target if needs_weight else None, None, ctx.backend)
        return dx, dweight, None, None


def column_parallel_linear(
    x: torch.Tensor,
    parameters: list[tuple[torch.Tensor, torch.Tensor | None]],
    region: TensorRegion,
    *,
    activation: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """act(enter(x) W^T + b) for each (W, b): x in the residual stream's layout -> one (..., T, N/R) for each.

    All weights read one gathered copy of x, and their parts of dx go through one collective.
    """
    if region.group is None or not torch.is_grad_enabled():
        return tuple(linear(x, weight, bias, activation=activation) for weight, bias in parameters)
    flat = [tensor for pair in parameters for tensor in pair]
    return _ColumnParallel.apply(x, region.group, region.shards_sequence, activation, *flat)


def row_parallel_linear(x: torch.Tensor, weight: torch.Tensor, region: TensorRegion) -> torch.Tensor:
    """leave(x W^T): x (..., T, K/R) -> (..., N) in the residual stream's layout."""
    if region.group is None or not torch.is_grad_enabled():
        return region.leave(linear(x, weight))
    return _RowParallel.apply(x, weight, region.group, region.shards_sequence)
