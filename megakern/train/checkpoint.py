"""Checkpoints: safetensors shards and a signed manifest in a folder that appears at once, or not at all. No pickle.

    run/ckpt/step-00000120/    rank-00000-part-000.safetensors ...  manifest.json
    run/ckpt/latest            the name of the last one saved; a hint, never trusted

    1 write shards, 2 fsync each      into step-00000120.tmp-<8 hex digits>
    3 gather hashes                   all ranks succeed, or all raise the same error
    4 write manifest, fsync           rank 0, from here on
    5 fsync the folder
    6 rename to step-00000120         the moment it exists; one of the same step became .old-<hex> just before
    7 fsync the parent
    8 replace `latest`
    9 remove older ones

A process that dies leaves the older checkpoints as they were, and a `.tmp-` folder that the next save removes. One that
dies inside step 6 leaves the replaced checkpoint as `.old-`, which `newest` reads and the next save puts back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megakern.parallel.blocks import blocks_of
from megakern.parallel.context import DIMS, ParallelContext
from megakern.train.checkpoint_commit import CheckpointWriteError, Staged, commit, folder_name
from megakern.train.checkpoint_load import load, newest, require_tokenizer, verify
from megakern.train.checkpoint_plan import Part, claim, parts_of, plain_state, plan_of, refuse_non_finite
from megakern.train.checkpoint_ranks import Phase
from megakern.train.checkpoint_report import Listed, listing, report, show
from megakern.train.files import REAL, Files
from megakern.train.manifest import CheckpointError, Manifest, NoCheckpointError, read_manifest

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "Listed",
    "Manifest",
    "NoCheckpointError",
    "Staged",
    "commit",
    "folder_name",
    "listing",
    "load",
    "newest",
    "read_manifest",
    "report",
    "require_tokenizer",
    "save",
    "show",
    "stage",
    "verify",
]


def save(
    folder: str | os.PathLike,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    parallel: ParallelContext,
    *,
    keep: int = 2,
    files: Files = REAL,
) -> Path:
    """Saves a checkpoint as `folder/step-<step>` and returns its path. All ranks call it; all must see `folder`.

    tensors: global name -> this rank's tensor, a DTensor or plain (then the whole, the same on all ranks). Each element
    is written once, by the first rank that holds it. state: JSON-able; that of rank 0 is saved. keep: how many sound
    checkpoints stay, this one among them. A checkpoint of the same step is replaced, and is sound until the new one is.
    Memory: one copy of `PART_BYTES` or of the largest piece, on the host; two for tensors on a GPU.

    Raises CheckpointError, the same on every rank: non-finite values in model or optimizer, an argument that cannot be
    saved; and CheckpointWriteError: no space, a failed write. Then older checkpoints are as they were, and nothing new
    is left behind. Only when the fsync of `folder` fails is the new one there already.
    """
    return commit(_plan(folder, step, tensors, state, parallel, keep, copy=False), parallel, files=files)


def stage(
    folder: str | os.PathLike,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    parallel: ParallelContext,
    *,
    keep: int = 2,
) -> Staged:
    """The first half of `save`: checks, then copies what this rank will write. `tensors` may change afterwards.

    `commit` is the second half, and may run in another thread with a process group of its own. Memory: one copy of
    what this rank writes, in host memory, until it is written; `commit` adds one of `PART_BYTES`.
    Raises CheckpointError, the same on every rank.
    """
    return _plan(folder, step, tensors, state, parallel, keep, copy=True)


def _plan(folder, step, tensors, state, parallel, keep, *, copy: bool) -> Staged:
    folder = Path(folder)
    doing = f"saving step {step} to {folder}"
    with Phase(parallel, doing) as phase:
        if keep < 2:
            raise CheckpointError(f"keep must be 2 or more, got {keep}: one checkpoint alone has no fallback")
        if not 0 <= step < 10**15:
            raise CheckpointError(f"step must be in [0, 10^15), got {step}")
        state = plain_state(state)
        refuse_non_finite(tensors)
        blocks = {name: blocks_of(name, tensor) for name, tensor in tensors.items()}
        phase.value = [step, {name: claim(name, tensor, blocks[name]) for name, tensor in sorted(tensors.items())}]
    plan = plan_of(phase.values)
    parts = parts_of(tensors, blocks, plan, parallel.world_rank, copy=copy)
    if copy:
        with Phase(parallel, doing):
            parts = _handed_out(list(parts))
    layout = {dim: parallel.size(dim) for dim in DIMS}
    return Staged(folder, step, state, plan, parts, layout, torch.get_num_threads(), keep)


def _handed_out(parts: list[Part]) -> Iterator[Part]:
    """Each part once, and held no longer."""
    while parts:
        yield parts.pop(0)
