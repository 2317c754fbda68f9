"""Collectives inside the graph, each with its adjoint (arXiv 1909.08053, figure 3; arXiv 2205.05198).

    operator                          forward                 backward
    copy_to_tensor_parallel           identity                all-reduce
    reduce_from_tensor_parallel       all-reduce              identity
    gather_from_tensor_parallel       all-gather, last dim    take own slice
    scatter_to_tensor_parallel        take own slice          all-gather, last dim

All take (x, group) and return x itself when `group` is None (one rank).
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The reduced tensor, out of place, outside the graph."""
    if group is None:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out


def all_gather_last(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N/R) of each rank -> (..., N), outside the graph."""
    if group is None:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def own_slice_last(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N) -> this rank's (..., N/R), outside the graph."""
    if group is None:
        return x
    return x.chunk(group.size(), dim=-1)[group.rank()].contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return all_reduce(dout, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, dout):
        return dout, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather_last(x, group)

    @staticmethod
    def backward(ctx, dout):
        return own_slice_last(dout, ctx.group), None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return own_slice_last(x, group)

    @staticmethod
    def backward(ctx, dout):
        return all_gather_last(dout, ctx.group), None


def copy_to_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """f of arXiv 1909.08053: x replicated, read by each rank's shard of the weights."""
    return x if group is None else _CopyTo.apply(x, group)


def reduce_from_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """g of arXiv 1909.08053: the sum of each rank's partial x, on every rank."""
    return x if group is None else _ReduceFrom.apply(x, group)


def gather_from_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N/R) -> (..., N) on every rank."""
    return x if group is None else _GatherFrom.apply(x, group)


def scatter_to_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N) -> this rank's (..., N/R)."""
    return x if group is None else _ScatterTo.apply(x, group)
