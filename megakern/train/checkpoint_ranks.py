"""What ranks must know of each other to save or load together: who holds which block of a tensor, and who failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from megakern.parallel.context import ParallelContext
from megakern.train.manifest import CheckpointError


class Block(NamedTuple):
    """`shape` elements that are at `offsets` of the whole tensor and at `local` of this rank's tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    local: tuple[int, ...]

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The view of this rank's tensor."""
        return local[tuple(slice(start, start + size) for start, size in zip(self.local, self.shape, strict=True))]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, the same memory, outside the graph."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def blocks_of(name: str, tensor: torch.Tensor) -> list[Block]:
    """The blocks of the whole tensor that this rank holds; none when it holds no element.

    A plain tensor and `Replicate` are the whole. Cuts follow torch.chunk, dims of the mesh from left to right; a
    placement with a `split_factor` (FSDP over tensor parallel) cuts each of that many chunks, and may leave a rank
    several blocks.

    Raises CheckpointError for a partial sum, and for a local shape that the placements do not explain.
    """
    shape = tuple(tensor.shape)
    runs = [[(0, size)] for size in shape]  # along each dim: (start, stop) of what this rank holds
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return []
        for placement, index, parts in zip(tensor.placements, coordinate, mesh.shape, strict=True):
            if placement.is_partial():
                raise CheckpointError(
                    f"{name} is a sum that is not finished (placements {tensor.placements}); reduce it first"
                )
            if placement.is_replicate():
                continue
            factor = getattr(placement, "split_factor", 1)
            chunks = [_chunk(runs[placement.dim], factor, part) for part in range(factor)]
            runs[placement.dim] = [run for chunk in chunks for run in _chunk(chunk, parts, index)]
    runs = [_merge(cut) for cut in runs]
    held = tuple(sum(stop - start for start, stop in cut) for cut in runs)
    if held != tuple(local_of(tensor).shape):
        raise CheckpointError(
            f"{name} of shape {shape}: its placements give this rank {held}, but its local tensor has "
            f"{tuple(local_of(tensor).shape)}; choose a layout that divides the tensor evenly"
        )
    blocks = [Block((), (), ())]
    for cut in runs:
        local, extended = 0, []
        for start, stop in cut:
            size = stop - start
            extended += [Block((*b.offsets, start), (*b.shape, size), (*b.local, local)) for b in blocks]
            local += size
        blocks = extended
    return blocks


def _chunk(runs: Sequence[tuple[int, int]], parts: int, index: int) -> list[tuple[int, int]]:
    """Part `index` of torch.chunk over the concatenation of `runs`."""
    total = sum(stop - start for start, stop in runs)
    each = -(-total // parts)
    first, last = min(index * each, total), min((index + 1) * each, total)
    out, position = [], 0
    for start, stop in runs:
        low, high = max(first - position, 0), min(last - position, stop - start)
        if low < high:
            out.append((start + low, start + high))
        position += stop - start
    return out


def _merge(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours joined, empty ones left out."""
    out: list[tuple[int, int]] = []
    for start, stop in runs:
        if start == stop:
            continue
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def gather(parallel: ParallelContext, report: Any) -> list[Any]:
    """The JSON-able `report` of each rank, on every rank. No pickle: JSON text as bytes in a tensor."""
    if parallel.world_size == 1:
        return [report]
    device = parallel.device()
    data = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(parallel.world_size)]
    dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(size)].cpu().numpy())) for part, size in zip(parts, sizes, strict=True)]


class Phase:
    """`with Phase(parallel, "saving step 3") as phase:` all ranks do a part of the work, then know how it went.

    Each may set `phase.value` (JSON-able); after the block `phase.values` has that of every rank. When the block raised
    on any rank, every rank raises the same CheckpointError, which names the ranks and their reasons, so that nobody
    waits for a rank that failed.
    """

    def __init__(self, parallel: ParallelContext, doing: str) -> None:
        self.parallel, self.doing = parallel, doing
        self.value: Any = None
        self.values: list[Any] = []

    def __enter__(self) -> Phase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reports = gather(self.parallel, [None if error is None else _reason(error), None if error else self.value])
        self.values = [value for _, value in reports]
        reasons: dict[str, list[int]] = {}
        for rank, (reason, _) in enumerate(reports):
            if reason is not None:
                reasons.setdefault(reason, []).append(rank)
        if not reasons or (error is not None and not isinstance(error, Exception)):
            return  # all well, or this rank was interrupted: its own exception goes on
        lines = [f"{_ranks(ranks, self.parallel.world_size)}{reason}" for reason, ranks in reasons.items()]
        raise CheckpointError(f"{self.doing} failed: " + "; ".join(lines)) from error


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _ranks(ranks: list[int], world: int) -> str:
    if world == 1:
        return ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
