"""What a checkpoint will hold: checks before saving, which rank writes which block, and the parts it writes them in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megakern.parallel.blocks import Block, local_of
from megakern.train.manifest import DTYPES, TENSOR_NAME, CheckpointError, canonical, piece_key, tiling_fault

PART_BYTES = 512 * 2**20
"""A rank starts a new file when the next piece would bring the file above this many bytes."""

FINITE = ("model.", "optimizer.")
"""Tensors whose names start so must be finite."""


def plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """`state` as it will come back (tuples as lists). Raises CheckpointError when JSON would change more."""
    try:
        back = json.loads(canonical(state))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state must be JSON-able: {error}") from error
    if not isinstance(back, dict) or back != _lists(state):
        raise CheckpointError("state must be JSON-able and come back equal: use text as the keys of every table")
    return back


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def refuse_non_finite(tensors: dict[str, torch.Tensor]) -> None:
    bad = []
    for name, tensor in sorted(tensors.items()):
        local = local_of(tensor)
        if not name.startswith(FINITE) or not local.is_floating_point() or local.numel() == 0:
            continue
        if local.dtype.itemsize == 1:
            local = local.float()  # float8 has no min and max
        low, high = torch.aminmax(local)  # carries NaN and infinities on, and needs no memory
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            bad.append(name)
    if bad:
        raise CheckpointError(
            f"not saved, these hold NaN or infinity: {', '.join(bad)}; go back to an older checkpoint"
        )


def claim(name: str, tensor: torch.Tensor, blocks: list[Block]) -> list:
    """[dtype, shape of the whole, [[offsets, shape] of each of the `blocks` that this rank holds]]."""
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{name!r} cannot be a tensor name: it must match {TENSOR_NAME.pattern}, and hold no '..'"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is {dtype}; a checkpoint can hold {', '.join(DTYPES)}")
    return [dtype, list(tensor.shape), [[block.offsets, block.shape] for block in blocks]]


# name -> (dtype, shape of the whole, {(offsets, shape): the rank that writes it})
Plan = dict[str, tuple[str, tuple[int, ...], dict[tuple[tuple[int, ...], tuple[int, ...]], int]]]


def plan_of(claims: list) -> Plan:
    """Who writes what: of the ranks that hold a block, the first. Raises CheckpointError for gaps and overlaps."""
    if len({step for step, _ in claims}) > 1:
        raise CheckpointError(f"the ranks are at different steps: {[step for step, _ in claims]}")
    plan: Plan = {}
    for rank, (_, names) in enumerate(claims):
        for name, (dtype, shape, blocks) in names.items():
            known = plan.setdefault(name, (dtype, tuple(shape), {}))
            if known[:2] != (dtype, tuple(shape)):
                raise CheckpointError(
                    f"{name} is {dtype} {shape} on rank {rank}, but {known[0]} {list(known[1])} before it"
                )
            for offsets, size in blocks:
                known[2].setdefault((tuple(offsets), tuple(size)), rank)
    for name, (_, shape, blocks) in plan.items():
        if fault := tiling_fault(shape, blocks):
            raise CheckpointError(f"the ranks together do not hold {name} exactly once: {fault}")
    return plan


def bytes_needed(plan: Plan, state: dict[str, Any]) -> int:
    """The size of the checkpoint in bytes, rounded up: tensors, and an allowance for headers and the manifest."""
    data = sum(math.prod(shape) * DTYPES[dtype][1] for dtype, shape, _ in plan.values())
    pieces = sum(len(blocks) + 1 for _, _, blocks in plan.values())
    return data + 1000 * pieces + len(canonical(state)) + 2**16


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint before it is written."""

    file: str
    tensors: dict[str, torch.Tensor]
    """Key in the file -> the piece: contiguous, in host memory."""
    pieces: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]
    """(name of the tensor, key, offsets, shape) of each piece."""


def parts_of(
    tensors: dict[str, torch.Tensor], blocks: dict[str, list[Block]], plan: Plan, rank: int, *, copy: bool = False
) -> Iterator[Part]:
    """What `rank` writes, made one part at a time: at most PART_BYTES each where a single piece is not larger.

    blocks: those that this process holds of each tensor. copy: the parts share no memory with `tensors`.
    """
    for number, group in enumerate(_groups(tensors, blocks, plan, rank)):
        file = f"rank-{rank:05d}-part-{number:03d}.safetensors"
        held: dict[str, torch.Tensor] = {}
        pieces = []
        for name, block in group:
            key = piece_key(name, plan[name][1], block.offsets, block.shape)
            held[key] = _own(block, tensors[name], held, copy)
            pieces.append((name, key, block.offsets, block.shape))
        yield Part(file, held, pieces)


def _groups(
    tensors: dict[str, torch.Tensor], blocks: dict[str, list[Block]], plan: Plan, rank: int
) -> list[list[tuple[str, Block]]]:
    groups: list[list[tuple[str, Block]]] = []
    room = 0
    for name, tensor in sorted(tensors.items()):
        for block in blocks[name]:
            if plan[name][2][block.offsets, block.shape] != rank:
                continue
            size = math.prod(block.shape) * tensor.dtype.itemsize
            if not groups or size > room:
                groups.append([])
                room = PART_BYTES
            groups[-1].append((name, block))
            room -= size
    return groups


def _own(block: Block, tensor: torch.Tensor, part: dict[str, torch.Tensor], copy: bool) -> torch.Tensor:
    """The block in host memory, contiguous. Tied tensors are copied: safetensors refuses two names for one memory."""
    local = local_of(tensor)
    data = block.of(local).cpu().contiguous()
    memory = data.untyped_storage().data_ptr()
    if copy:
        return data.clone() if memory == local.untyped_storage().data_ptr() else data
    shared = any(other.untyped_storage().data_ptr() == memory for other in part.values())
    return data.clone() if shared else data
