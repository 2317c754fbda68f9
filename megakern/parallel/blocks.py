"""Which blocks of a whole tensor this rank holds, from a DTensor's placements alone: no tensor is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor


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

    Raises ValueError for a partial sum, and for a local shape that the placements do not explain.
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
                raise ValueError(
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
        raise ValueError(
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
