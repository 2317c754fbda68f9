"""The global L2 norm of gradients, over shards and ranks, and clipping by it (Pascanu et al. 2012, arXiv 1211.5063).

    norm = sqrt(sum over all elements of g^2)          coefficient = min(1, max_norm / (norm + 1e-6))

A DTensor gradient counts each element once: the squares of shards are summed over the mesh dims that shard it, and a
dim that replicates it adds nothing. A plain tensor is taken as the same on every rank, and counts once. Computed in
fp32 (fp64 if a gradient is fp64). What crosses ranks: one all-reduce of a few numbers for each mesh dim that shards
gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megakern.ops import checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve
from megakern.parallel.collectives import all_reduce_in_place


def gradient_norm_reference(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of whole (unsharded) gradients, in float64."""
    return sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64)).sqrt()


@describes("clip_grad_norm_")
def _problem(params, max_norm=float("inf"), *, scale_in_place=True) -> Problem:
    gradients = [_local(gradient) for gradient in _gradients(params)]
    first = gradients[0] if gradients else torch.empty(0)
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else first.dtype
    sizes = {"tensors": len(gradients), "elements": sum(gradient.numel() for gradient in gradients)}
    return Problem("clip_grad_norm_", first.device.type, dtype, sizes)


def _fake(tensors, backend):
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tensors[0].new_empty((), dtype=wide)


_sum_of_squares = register(
    "sum_of_squares",
    "(Tensor[] tensors, str backend) -> Tensor",
    forward=lambda tensors, backend: launcher(backend, "grad_norm", "sum_of_squares")(tensors),
    fake=_fake,
    opaque=lambda *arguments: True,  # some backends need the tensors' addresses
)


def _gradients(params: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    params = [params] if isinstance(params, torch.Tensor) else params
    gradients = [param.grad for param in params if param.grad is not None]
    for gradient in gradients:
        if gradient.layout != torch.strided or gradient.dtype not in checks.FLOATS:
            raise TypeError(
                f"gradient_norm: gradients must be dense float16, bfloat16, float32 or float64, "
                f"got {gradient.dtype} of layout {gradient.layout}"
            )
    return gradients


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_groups(gradient: torch.Tensor) -> dict[str, dist.ProcessGroup]:
    """The process groups, by name, of the mesh dims that shard `gradient`; empty for a plain or replicated one."""
    groups = {}
    for dim, placement in enumerate(getattr(gradient, "placements", ())):
        if placement.is_partial():
            raise ValueError(
                f"gradient_norm: a gradient has placements {gradient.placements}: its sum over the ranks of mesh dim "
                f"{dim} is not made yet; call finish_gradients(model.parameters()) after the last backward"
            )
        if not placement.is_replicate() and gradient.device_mesh.size(dim) > 1:
            group = gradient.device_mesh.get_group(dim)
            groups[group.group_name] = group
    return groups


@torch.no_grad()
def gradient_norm(params: torch.Tensor | Iterable[torch.Tensor], *, backend: str | None = None) -> torch.Tensor:
    """The L2 norm over the gradients of all `params` that have one: a 0-d tensor, the same on every rank.

    Every rank must pass the same parameters in the same order. 0 where there is no gradient. Raises TypeError on a
    sparse gradient, ValueError on one with a partial placement.
    """
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    gradients = _gradients(params)
    if not gradients:
        return torch.zeros(())
    chosen = resolve(_problem(params), backend)
    groups: dict[str, dist.ProcessGroup] = {}
    batches: dict[tuple[str, ...], list[torch.Tensor]] = {}  # by the names of the groups to sum over
    for gradient in gradients:
        own = _sharding_groups(gradient)
        groups.update(own)
        batches.setdefault(tuple(own), []).append(_local(gradient))
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    sums = {names: _sum_of_squares(tensors, chosen).to(wide) for names, tensors in batches.items()}
    for name, group in groups.items():
        members = [names for names in sums if name in names]
        part = torch.stack([sums[names] for names in members])
        all_reduce_in_place(part, group)
        sums.update(zip(members, part, strict=True))
    return torch.stack(list(sums.values())).sum().sqrt()


def clip_coefficient(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), 0-d, on norm's device. Raises ValueError unless max_norm is above 0."""
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be above 0, got {max_norm}; use inf to measure only")
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def clip_grad_norm_(
    params: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    *,
    scale_in_place: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm` -> the norm before, 0-d.

    As torch.nn.utils.clip_grad_norm_, for any mix of sharded, replicated and plain parameters. With
    `scale_in_place=False` the gradients stay: pass `clip_coefficient(norm, max_norm)` to `AdamW.step(grad_scale=...)`,
    which saves a pass over them. max_norm = inf only measures. Raises as `gradient_norm` and `clip_coefficient` do.
    """
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    norm = gradient_norm(params, backend=backend)
    coefficient = clip_coefficient(norm, max_norm)
    gradients = [_local(gradient) for gradient in _gradients(params)]
    if not scale_in_place or max_norm == float("inf") or not gradients:
        return norm
    if coefficient.device.type == "cpu" and coefficient == 1:  # reading it costs nothing there
        return norm
    torch._foreach_mul_(gradients, coefficient)
    return norm
