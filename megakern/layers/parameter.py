"""How parameters are made, filled and read: full-size meaning, this rank's slice.

A sharded parameter is a `DTensor` over the context's "tp" mesh: `Shard(0)` for output rows, `Shard(1)` for input
columns. Under tp > 1 the others are DTensors with `Replicate()`, so that one optimizer and one checkpoint code sees one
kind of parameter; on one rank all are plain tensors. Layers compute on `local(parameter)` and call the collectives
themselves.

After `accumulate_in_fp32` gradients of all parameters are summed over micro-batches in fp32, also those of bf16
parameters, and linear layers add to the sum in place. `Tensor.grad_dtype` allows such gradients on the leaf, and on the
slice that a layer reads.

The value of each element is a function of (seed, the parameter's full name, its logical index), so that every layout
starts from the same model, bit for bit, and each rank computes its slice alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from megakern.ops.gradients import GradientTarget
from megakern.parallel.blocks import blocks_of, local_of
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import keep_gradients_wide
from megakern.parallel.random import fill_normal, fold


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float


@dataclass(frozen=True)
class Normal:
    """N(0, std^2) by logical index; from row `rows` on (padding of a vocabulary) zero."""

    std: float
    rows: int | None = None


def add_parameter(
    module: nn.Module,
    name: str,
    full_shape: tuple[int, ...],
    initializer: Constant | Normal,
    parallel: ParallelContext,
    *,
    shard: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Register `module.<name>` of `full_shape`, sharded over tp along dim `shard` (None: replicated), not yet filled.

    Raises ValueError when tp does not divide that dim.
    """
    local_shape = list(full_shape)
    if shard is not None:
        local_shape[shard] = parallel.shard(full_shape[shard], f"dim {shard} of {type(module).__name__}.{name}")
    value = torch.empty(local_shape, device=device, dtype=dtype)
    if parallel.tp_size > 1:
        placement = Replicate() if shard is None else Shard(shard)
        value = DTensor.from_local(value, parallel.mesh["tp"], [placement], run_check=False)
    module.register_parameter(name, nn.Parameter(value))
    if not hasattr(module, "initializers"):
        module.initializers = {}
    module.initializers[name] = initializer


def local(parameter: torch.Tensor | None, *, partial: bool = False) -> torch.Tensor | None:
    """This rank's slice of a parameter, inside the graph: the gradient goes back as the parameter is placed.

    partial: each rank uses a replicated parameter on data of its own, so the gradient is this rank's part of a sum. It
    goes back as `Partial()`; `finish_gradients` adds the parts up once a step (FSDP2 does it before its own reduction).
    """
    if getattr(parameter, "accumulates", False) and torch.is_grad_enabled():
        value = _Local.apply(parameter, parameter.grad_dtype, partial)
        if parameter.ndim >= 2:
            value.gradient_target = GradientTarget(parameter.grad_dtype, None if partial else parameter)
        return value
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial else None)


class _Local(torch.autograd.Function):
    """parameter -> this rank's slice: a matrix is the same memory, a vector a copy in the gradient's dtype."""

    @staticmethod
    def forward(ctx, parameter, dtype, partial):
        ctx.set_materialize_grads(False)
        ctx.spec = None
        if isinstance(parameter, DTensor):
            placements = [Partial()] if partial else parameter.placements
            ctx.spec = (parameter.device_mesh, placements, parameter.shape, parameter.stride())
        value = local_of(parameter)
        value = value.to(dtype) if parameter.ndim < 2 else value
        value.grad_dtype = dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, dvalue):
        if dvalue is None or ctx.spec is None:
            return dvalue, None, None
        mesh, placements, shape, stride = ctx.spec
        gradient = DTensor.from_local(dvalue, mesh, placements, run_check=False, shape=shape, stride=stride)
        return gradient, None, None


def accumulate_in_fp32(module: nn.Module) -> None:
    """From now on gradients of the floating parameters below `module` are accumulated in fp32 (fp64 for fp64).

    `.grad` is fp32 whatever the parameter's dtype: use an optimizer that allows this, as `mk.AdamW`. Linear layers add
    later micro-batches to `.grad` in place and give autograd nothing, so hooks on a gradient miss those, and only
    `backward()` may be used, not `torch.autograd.grad` with respect to a parameter.
    Under FSDP2 the reduced gradients of the shards are fp32 too. Call it after `fully_shard`. All ranks must call it.
    """
    sharded = [child for child in module.modules() if isinstance(child, FSDPModule)]
    if not sharded:
        _accumulate(module.parameters())
    for child in sharded:  # one at a time: what is gathered for it is never more than one
        child.unshard()
        _accumulate(_own_parameters(child))
        child.reshard()
        for shard in _own_parameters(child):
            shard.grad_dtype = _wide(shard)
        keep_gradients_wide(child)


def _accumulate(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad_dtype = _wide(parameter)
        parameter.accumulates = True


def _wide(parameter: torch.Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that FSDP2 gathers with `module`: without what is below another FSDP module."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter below `module` that has an initializer; parameters on the meta device stay as they are.

    Works on any placement: tensor parallelism, FSDP2's `fully_shard`, and both.
    """
    for path, child in module.named_modules():
        for name, initializer in getattr(child, "initializers", {}).items():
            parameter = child.get_parameter(name)
            if not parameter.is_meta:
                _fill(parameter, local_of(parameter), initializer, _key(seed, path, name))


def initial_values(module: nn.Module, seed: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter that `initialize` fills, with this rank's slice of its values in fp32, one after the other.

    For masters of narrow parameters: they start from the same bits as fp32 parameters do.
    """
    for path, child in module.named_modules():
        for name, initializer in getattr(child, "initializers", {}).items():
            parameter = child.get_parameter(name)
            values = torch.empty_like(local_of(parameter), dtype=torch.float32)
            _fill(parameter, values, initializer, _key(seed, path, name))
            yield parameter, values


def _key(seed: int, path: str, name: str) -> int:
    return fold(seed, f"{path}.{name}" if path else name)


def initialize_standalone(module: nn.Module) -> None:
    """What a layer does at construction: fill its own parameters from a seed drawn from torch's default generator.

    `torch.manual_seed` with one value on every rank gives every rank its slice of the same layer.
    """
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        initialize(module, int(torch.randint(1 << 62, (), device="cpu")))


@torch.no_grad()
def _fill(parameter: torch.Tensor, into: torch.Tensor, initializer: Constant | Normal, key: int) -> None:
    """`into` has the shape of this rank's slice of `parameter`."""
    if isinstance(initializer, Constant):
        into.fill_(initializer.value)
        return
    for block in blocks_of("parameter", parameter):
        values = block.of(into)
        fill_normal(values, key, initializer.std, full_shape=tuple(parameter.shape), offsets=block.offsets)
        if initializer.rows is not None:
            values[max(0, initializer.rows - block.offsets[0]) :].zero_()
