"""Collectives inside the graph, each with its adjoint (arXiv 1909.08053, figure 3; arXiv 2205.05198).

    operator                          forward                 backward
    copy_to_tensor_parallel           identity                all-reduce
    reduce_from_tensor_parallel       all-reduce              identity
    gather_from_tensor_parallel       all-gather, last dim    take own slice
    scatter_to_tensor_parallel        take own slice          all-gather, last dim
    gather_sequence                   all-gather, T           reduce-scatter, T
    reduce_scatter_sequence           reduce-scatter, T       all-gather, T
    scatter_sequence                  take own tokens         all-gather, T

All take (x, group) and return x itself when `group` is None (one rank). T is the last dim but one: x (..., T, C). The
`start_...` functions return at once, for work beside the collective. `finish_gradients` makes, once a step, the sums
that gradients of shared parameters lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from megakern.parallel import shared, trace


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """The reduced tensor, out of place, outside the graph."""
    if group is None:
        return x
    if (channel := _channel(x, group, op)) is not None:
        x = x.contiguous()
        out = torch.empty_like(x)
        trace.collective("all_reduce", out, group)
        channel.finish(channel.start_all_reduce(x, out, reduction=_REDUCTIONS[op], ahead=0))
        return out
    out = x.clone(memory_format=torch.contiguous_format)
    trace.collective("all_reduce", out, group)
    dist.all_reduce(out, op=op, group=group)
    return out


def all_reduce_in_place(x: torch.Tensor, group: dist.ProcessGroup, op=dist.ReduceOp.SUM) -> None:
    """x, contiguous, becomes the reduced tensor, outside the graph."""
    channel = _channel(x, group, op)
    trace.collective("all_reduce", x, group)
    if channel is not None:
        channel.finish(channel.start_all_reduce(x, x, reduction=_REDUCTIONS[op], ahead=0))
    else:
        dist.all_reduce(x, op=op, group=group)


_REDUCTIONS = {dist.ReduceOp.SUM: shared.SUM, dist.ReduceOp.MAX: shared.MAX}


def _channel(x: torch.Tensor, group: dist.ProcessGroup, op=dist.ReduceOp.SUM) -> shared.Channel | None:
    """What can reduce `x` through shared memory, or None."""
    if torch.compiler.is_compiling() or x.dtype not in shared.REDUCED or op not in _REDUCTIONS:
        return None
    return shared.channel_for(x, group)


def all_gather_last(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N/R) of each rank -> (..., N), outside the graph."""
    if group is None:
        return x
    if (channel := shared.channel_for(x, group)) is not None:
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], x.shape[-1] * group.size()))
        trace.collective("all_gather", x, group)
        channel.finish(channel.start_all_gather(x, out, x.shape[-1], ahead=0))
        return out
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    trace.collective("all_gather", x, group)
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def own_slice_last(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., N) -> this rank's (..., N/R), outside the graph."""
    if group is None:
        return x
    return x.chunk(group.size(), dim=-1)[group.rank()].contiguous()


# torch 2.13 renamed these two and warns about the old names; torch 2.11 has only those.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def tokens_each(tokens: int, group: dist.ProcessGroup) -> int:
    """T / R. Raises ValueError when R does not divide it."""
    if tokens % group.size():
        raise ValueError(
            f"sequence parallelism: T = {tokens} tokens cannot be split over tp = {group.size()} ranks; pad or cut the "
            f"text to a multiple of {group.size()}, or turn sequence_parallel off (it is off under torch.no_grad())"
        )
    return tokens // group.size()


class Pending:
    """A collective that runs while the caller computes. `wait()` gives its result; the stream waits, not the CPU."""

    def __init__(self, wait: Callable[[], torch.Tensor]):
        self._wait = wait

    def wait(self) -> torch.Tensor:
        return self._wait()

    @classmethod
    def of_torch(cls, work: dist.Work, result: torch.Tensor, arrange: Callable = lambda result: result) -> Pending:
        return cls(lambda: (work.wait(), arrange(result))[1])

    @classmethod
    def of_channel(cls, channel: shared.Channel, number: int, result: torch.Tensor, x: torch.Tensor) -> Pending:
        """x: what is read meanwhile, kept until then."""
        return cls(lambda: (channel.finish(number), result, x)[1])


def start_all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over the ranks, written into `x`, which must be contiguous and the caller's own."""
    channel = _channel(x, group)
    trace.collective("all_reduce", x, group)
    if channel is not None:
        return Pending.of_channel(channel, channel.start_all_reduce(x, x), x, x)
    return Pending.of_torch(dist.all_reduce(x, group=group, async_op=True), x)


def start_gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """(..., T/R, C) of each rank -> (..., T, C)."""
    channel = shared.channel_for(x, group)
    trace.collective("all_gather", x, group)
    if channel is not None:
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-2], x.shape[-2] * group.size(), x.shape[-1]))
        return Pending.of_channel(channel, channel.start_all_gather(x, out, x.shape[-2] * x.shape[-1]), out, x)
    parts = x.new_empty((group.size(), *x.shape))
    work = _all_gather_single(parts.flatten(0, 1), x.contiguous(), group=group, async_op=True)
    return Pending.of_torch(work, parts, lambda parts: parts.movedim(0, -3).flatten(-3, -2))


def start_reduce_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """The ranks' partial (..., T, C) -> this rank's tokens of their sum, (..., T/R, C)."""
    own = tokens_each(x.shape[-2], group)
    channel = _channel(x, group)
    trace.collective("reduce_scatter", x, group)
    if channel is not None:
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-2], own, x.shape[-1]))
        return Pending.of_channel(channel, channel.start_reduce_scatter(x, out, own * x.shape[-1]), out, x)
    parts = x.unflatten(-2, (group.size(), own)).movedim(-3, 0).contiguous()
    out = torch.empty_like(parts[0])
    work = _reduce_scatter_single(out, parts.flatten(0, 1), group=group, async_op=True)
    return Pending.of_torch(work, out)


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


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return start_gather_sequence(x, group).wait()

    @staticmethod
    def backward(ctx, dout):
        return start_reduce_scatter_sequence(dout, ctx.group).wait(), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return start_reduce_scatter_sequence(x, group).wait()

    @staticmethod
    def backward(ctx, dout):
        return start_gather_sequence(dout, ctx.group).wait(), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        own = tokens_each(x.shape[-2], group)
        return x.narrow(-2, group.rank() * own, own).contiguous()

    @staticmethod
    def backward(ctx, dout):
        return start_gather_sequence(dout, ctx.group).wait(), None


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


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., T/R, C) -> (..., T, C) on every rank; each rank's gradient is taken as partial (arXiv 2205.05198, g)."""
    return x if group is None else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Each rank's partial (..., T, C) -> this rank's tokens of the sum, (..., T/R, C). Needs T % R == 0."""
    return x if group is None else _ReduceScatterSequence.apply(x, group)


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(..., T, C), the same on every rank -> this rank's (..., T/R, C). Raises ValueError unless R divides T."""
    return x if group is None else _ScatterSequence.apply(x, group)


@torch.no_grad()
def finish_gradients(params: torch.Tensor | Iterable[torch.Tensor]) -> None:
    """Sum the gradients that are partial over ranks, once a step, after the last backward and before norm or update.

    Layers on several ranks leave `Partial()` DTensor gradients on parameters that all ranks share and use on different
    data: those of heads (qk_norm), and under sequence parallelism those of norms, positions and row-parallel biases.
    This adds them up, one flat buffer and one all-reduce a group and dtype (Megatron-LM, finalize_model_grads), and
    leaves them `Replicate()`. Gradients accumulate while partial. Does nothing where nothing is partial. All ranks must
    pass the same parameters in the same order. `gradient_norm` and `AdamW` refuse partial gradients.
    """
    params = [params] if isinstance(params, torch.Tensor) else params
    batches: dict[tuple, list[torch.Tensor]] = {}
    for param in params:
        grad = param.grad
        for dim, placement in enumerate(getattr(grad, "placements", ())):
            if placement.is_partial():
                batches.setdefault((grad.device_mesh, dim, grad.dtype), []).append(param)
    for (mesh, dim, _), members in batches.items():
        locals_ = [param.grad.to_local() for param in members]
        flat = torch.cat([grad.reshape(-1) for grad in locals_])
        all_reduce_in_place(flat, mesh.get_group(dim))
        for param, grad, total in zip(members, locals_, flat.split([g.numel() for g in locals_]), strict=True):
            grad.copy_(total.view_as(grad))
            placements = list(param.grad.placements)
            placements[dim] = Replicate()
            param.grad = DTensor.from_local(
                grad, mesh, placements, run_check=False, shape=param.grad.shape, stride=param.grad.stride()
            )
