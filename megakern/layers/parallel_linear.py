"""Column- and row-parallel linear layers as autograd functions whose collectives run beside their matrix products.

Letters: K in, N out, R ranks, T tokens, s = T/R under sequence parallelism and T without. What one call does, in order
(arXiv 2205.05198, section 4.2; a collective is started, the line below it computed, then it is waited for):

    column, forward    sequence: all-gather x            y = act(x W^T + b), for each weight that reads this x
    column, backward   sequence: start all-gather x      dz = dy act'(z); dx = sum of dz W
                       start reduce-scatter dx (sequence) or all-reduce dx
                                                         dW = dz^T x, db = sum of dz
    row, forward       y = x W^T                         reduce-scatter y (sequence) or all-reduce y
    row, backward      sequence: all-gather dy           dx = dy W, or dz = (dy W) act'(z); dW = dy^T x

A sequence-parallel collective with nothing beside it (x and y in forward, dy in backward) is cut into pieces that
overlap with the product that reads or makes it, from `overlap_rows` rows on; or is one operator with it
(`fused_collectives`).

A column-parallel layer may hand z to the row-parallel layer that reads its output (`Activated`, megakern/ops/mlp.py):
then dz comes from that layer's product, and neither layer has a pass of its own over the inner gradient.

Saved: of the column-parallel layer the sharded x (..., s, K), the weights as they are and the pre-activations; of the
row-parallel layer x (..., T, K/R), z where it got one, and the weight. Weights may be fp32 for narrower x: they are
cast when they are read, in forward and in backward, so that no cast copy lives between the two.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megakern.ops.activation import activation_backward
from megakern.ops.gradients import target_of
from megakern.ops.linear import chosen_backend, forward_pieces, input_gradient, linear, parameter_gradients
from megakern.ops.mlp import (
    Activated,
    activated,
    autocast_layers,
    gradients_before,
    linear_activated,
    linear_after,
    open_pieces,
)
from megakern.parallel.collectives import (
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
)
from megakern.parallel.overlap import (
    fused_gather_matmul,
    fused_matmul_reduce_scatter,
    gather_then,
    then_reduce_scatter,
)
from megakern.parallel.region import TensorRegion


def _begin(ctx, region: TensorRegion, sequence: bool, activation: str | None, weights, biases) -> list[tuple]:
    """What the backward pass of column-parallel layers has to know -> (weight, bias) of each."""
    ctx.group, ctx.sequence, ctx.activation = region.group, sequence, activation
    ctx.targets = [target_of(weight) for weight in weights]
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
    return list(zip(weights, biases, strict=True))


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, region, sequence, activation, *parameters):
        weights, biases = parameters[0::2], parameters[1::2]
        pairs = _begin(ctx, region, sequence, activation, weights, biases)
        ctx.backends = [chosen_backend(x, weight, bias, activation) for weight, bias in pairs]
        keep = activation is not None

        def outputs_of(rows):
            results = [forward_pieces(rows, *pair, activation, keep=keep) for pair in pairs]
            return (*(y for y, _, _ in results), *(pre for _, pre, _ in results if keep))

        if not sequence:
            outputs = outputs_of(x)
        elif region.fused_collectives and not activation:
            _, outputs = fused_gather_matmul(x, [weight.to(x.dtype).t() for weight in weights], region.group)
            outputs = [y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True)]
        else:
            outputs = gather_then(x, region.group, outputs_of, region.pieces(x[..., 0].numel(), x.device))
        ctx.save_for_backward(x, *weights, *outputs[len(weights) :])
        return tuple(outputs[: len(weights)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *rest = ctx.saved_tensors
        weights, pres = rest[: len(dys)], rest[len(dys) :]
        needs = ctx.needs_input_grad
        needs_x, needs_weights, needs_biases = needs[0], needs[4::2], needs[5::2]
        arriving = start_gather_sequence(x, ctx.group) if ctx.sequence and any(needs_weights) else None
        if ctx.activation:
            dys = [
                activation_backward(dy, z, ctx.activation, backend)
                for dy, z, backend in zip(dys, pres, ctx.backends, strict=True)
            ]
        dx = None
        if needs_x:
            for dz, weight, backend in zip(dys, weights, ctx.backends, strict=True):
                dx = input_gradient(dz, weight, dx, backend)
        x = arriving.wait() if arriving is not None else x
        leaving = None
        if needs_x:
            leaving = (start_reduce_scatter_sequence if ctx.sequence else start_all_reduce)(dx, ctx.group)
        gradients = []
        for i, dz in enumerate(dys):
            target = ctx.targets[i] if needs_weights[i] else None
            bias_dtype = ctx.bias_dtypes[i] if needs_biases[i] else None
            gradients += parameter_gradients(dz, x, target, bias_dtype, ctx.backends[i])
        return leaving.wait() if leaving is not None else None, None, None, None, *gradients


class _ColumnParallelOpen(_ColumnParallel):
    """The same for an `Activated`: outputs are its value, which takes no gradient, and what the activation saw."""

    @staticmethod
    def forward(ctx, x, region, sequence, activation, *parameters):
        weights, biases = parameters[0::2], parameters[1::2]
        pairs = _begin(ctx, region, sequence, None, weights, biases)

        def outputs_of(rows):
            outputs, backend = open_pieces(rows, pairs, activation, keep=True)
            ctx.backends = [backend] * len(weights)
            return outputs

        if sequence:
            outputs = gather_then(x, region.group, outputs_of, region.pieces(x[..., 0].numel(), x.device))
        else:
            outputs = outputs_of(x)
        ctx.save_for_backward(x, *weights)
        ctx.mark_non_differentiable(outputs[0])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, _, *dzs):
        if all(dz is None for dz in dzs):
            return (None,) * len(ctx.needs_input_grad)
        return _ColumnParallel.backward(ctx, *dzs)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, region, sequence, activation, *pres):
        ctx.region, ctx.sequence, ctx.target, ctx.activation = region, sequence, target_of(weight), activation
        ctx.backend = chosen_backend(x, weight, None, None)
        ctx.save_for_backward(x, weight, *pres)

        def product(rows):
            return forward_pieces(rows, weight, None, None, keep=False)[0]

        if not sequence:
            return start_all_reduce(product(x), region.group).wait()
        if region.fused_collectives:
            return fused_matmul_reduce_scatter(x, weight.to(x.dtype).t(), region.group)
        rows = x[..., 0].numel() // region.size
        return then_reduce_scatter(x, region.group, product, region.pieces(rows, x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, *pres = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        wanted = any(ctx.needs_input_grad[5:]) if pres else needs_x
        dy, *dxs = _whole_and_products(ctx, dy, weight.to(dy.dtype) if wanted else None, pres)
        dweight, _ = parameter_gradients(dy, x, ctx.target if needs_weight else None, None, ctx.backend)
        dx, dpres = (None, dxs or [None] * len(pres)) if pres else (dxs[0] if dxs else None, [])
        return dx, dweight, None, None, None, *dpres


def _whole_and_products(
    ctx, dy: torch.Tensor, weight: torch.Tensor | None, pres: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """dy of all tokens (..., T, N); with a weight also dx = dy W (..., T, K/R), or in its place the gradient of each
    of `pres`."""
    region = ctx.region

    def products(rows, *pres):
        if weight is None:
            return (rows,)
        if pres:
            return rows, *gradients_before(rows, weight, pres, ctx.activation, ctx.backend)
        return rows, input_gradient(rows, weight, None, ctx.backend)

    if not ctx.sequence:
        return products(dy, *pres)
    if weight is None:
        return products(start_gather_sequence(dy, region.group).wait())
    if region.fused_collectives:
        whole, (dx,) = fused_gather_matmul(dy, [weight], region.group, with_x=True)
        return whole, dx
    pieces = region.pieces(dy[..., 0].numel(), dy.device)
    return gather_then(dy, region.group, products, pieces, tuple(pres))


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
    x, parameters = autocast_layers(x, parameters)
    flat = [tensor for pair in parameters for tensor in pair]
    return _ColumnParallel.apply(x, region, region.shards_sequence, activation, *flat)


def column_parallel_activated(
    x: torch.Tensor,
    parameters: list[tuple[torch.Tensor, torch.Tensor | None]],
    region: TensorRegion,
    activation: str,
) -> Activated:
    """act(enter(x) W^T + b) of one (W, b), or silu(gate) * up of two and "swiglu": what `row_parallel_linear` reads."""
    if region.group is None or not torch.is_grad_enabled():
        return linear_activated(x, parameters, activation)
    x, parameters = autocast_layers(x, parameters)
    flat = [tensor for pair in parameters for tensor in pair]
    outputs = _ColumnParallelOpen.apply(x, region, region.shards_sequence, activation, *flat)
    return activated(outputs, activation)


def row_parallel_linear(x: torch.Tensor | Activated, weight: torch.Tensor, region: TensorRegion) -> torch.Tensor:
    """leave(x W^T): x (..., T, K/R) -> (..., N) in the residual stream's layout."""
    if region.group is None or not torch.is_grad_enabled():
        return region.leave(linear_after(x, weight))
    if isinstance(x, Activated) and x.pre is not None:
        pres = (x.pre,) if x.up is None else (x.pre, x.up)
        return _RowParallel.apply(x.value, weight, region, region.shards_sequence, x.activation, *pres)
    x, ((weight, _),) = autocast_layers(x.value if isinstance(x, Activated) else x, [(weight, None)])
    return _RowParallel.apply(x, weight, region, region.shards_sequence, None)
