"""How a planned checkpoint reaches the disk: files, manifest, one rename, then tidying up. Read `commit` first."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes

import megakern
from megakern.parallel.context import ParallelContext
from megakern.train.checkpoint_load import LATEST, by_age, crc32, file_problems
from megakern.train.checkpoint_plan import Part, Plan, bytes_needed
from megakern.train.checkpoint_ranks import Phase
from megakern.train.files import REAL, Files, temporary_suffix
from megakern.train.manifest import (
    NAME,
    CheckpointError,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    parse,
    render,
)

log = logging.getLogger("megakern")

_STALE = re.compile(rf"(step-\d{{8,15}}|{LATEST})\.tmp-[0-9a-f]{{8}}")
_REPLACED = re.compile(r"(step-\d{8,15})\.old-[0-9a-f]{8}")


class CheckpointWriteError(CheckpointError):
    """The disk, or the folder, did not take a checkpoint that was fit to be saved. Older ones are as they were."""


@dataclass(frozen=True)
class Staged:
    """A checkpoint that all ranks have checked and planned. `commit` writes it, once."""

    folder: Path
    step: int
    state: dict[str, Any]
    plan: Plan
    parts: Iterable[Part]
    """What this process writes."""
    layout: dict[str, int]
    threads: int
    keep: int


def folder_name(step: int) -> str:
    """The name of the folder of `step`."""
    return f"step-{step:08d}"


def commit(
    staged: Staged, parallel: ParallelContext, *, files: Files = REAL, group: dist.ProcessGroup | None = None
) -> Path:
    """Writes a staged checkpoint and returns its path. All ranks call it, each with its own.

    group: the CPU process group to talk over, for a thread beside the one that trains; None: the default group.
    Raises CheckpointWriteError, the same on every rank. Then older checkpoints are as they were, and nothing new is
    left behind. Only when the fsync of the folder fails is the new one there already.
    """
    folder, step = staged.folder, staged.step

    def phase() -> Phase:
        return Phase(parallel, f"saving step {step} to {folder}", group, CheckpointWriteError)

    with phase() as prepared:
        if parallel.world_rank == 0:
            prepared.value = _prepare(folder, step, bytes_needed(staged.plan, staged.state), files)
    temporary = folder / prepared.values[0]
    try:
        with phase() as written:
            written.value = _write_parts(temporary, staged.parts, files)
        with phase():
            if parallel.world_rank == 0:
                raw = render(_manifest(staged, written.values))
                parse(raw, "what was to be saved")  # never publish what cannot be read
                _write(temporary / NAME, raw, files)
                files.sync_folder(temporary)
                replaced = _publish(folder, temporary, step, files)
    except BaseException:
        if parallel.world_rank == 0:
            _try_to_remove(temporary, files)
        raise
    with phase():
        if parallel.world_rank == 0:
            _tidy(folder, step, replaced, staged.keep, files)
    return folder / folder_name(step)


def _prepare(folder: Path, step: int, need: int, files: Files) -> str:
    """Clears what a killed save left, looks at the space, and makes the temporary folder. Returns its name."""
    try:
        os.makedirs(folder, exist_ok=True)
        for path in sorted(folder.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if _STALE.fullmatch(path.name):
                _try_to_remove(path, files)
            elif replaced and not (folder / replaced[1]).exists():
                files.rename(path, folder / replaced[1])  # killed between the two renames of a replacement
        free = files.free_bytes(folder)
        if free < need:
            raise CheckpointError(
                f"no space in {folder}: {_megabytes(need)} needed, {_megabytes(free)} free; "
                "make room, or keep fewer checkpoints"
            )
        temporary = folder / f"{folder_name(step)}.{temporary_suffix()}"
        files.make_folder(temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}") from error
    return temporary.name


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _write(path: Path, data: bytes, files: Files) -> None:
    try:
        files.write_file(path, data)
    except OSError as error:
        try:
            free = _megabytes(files.free_bytes(path.parent))
        except OSError:
            free = "unknown how much"
        raise CheckpointError(f"{error}; {_megabytes(len(data))} needed, {free} free") from error


def _write_parts(temporary: Path, parts: Iterable[Part], files: Files) -> list:
    """Writes `parts`. Returns [{file: [size, sha256]}, [[name, file, offsets, shape, crc32] of each piece]]."""
    written, pieces = {}, []
    for part in parts:
        data = safetensors_bytes(part.tensors, {"format": "pt"})
        _write(temporary / part.file, data, files)
        written[part.file] = [len(data), hashlib.sha256(data).hexdigest()]
        pieces += [
            [name, part.file, offsets, shape, crc32(part.tensors[key])] for name, key, offsets, shape in part.pieces
        ]
    return [written, pieces]


def _manifest(staged: Staged, written: list) -> Manifest:
    pieces: dict[str, list[Piece]] = {name: [] for name in staged.plan}
    for _, rank_pieces in written:
        for name, file, offsets, shape, crc in rank_pieces:
            pieces[name].append(Piece(file, tuple(offsets), tuple(shape), crc))
    older = (manifest.sequence for _, manifest, _ in by_age(staged.folder) if manifest)
    return Manifest(
        step=staged.step,
        sequence=1 + max(older, default=0),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        state=staged.state,
        layout=staged.layout,
        libraries={
            "megakern": megakern.__version__,
            "python": platform.python_version(),
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
        },
        threads=staged.threads,
        files={file: FileEntry(*entry) for rank_files, _ in written for file, entry in rank_files.items()},
        tensors={
            name: TensorEntry(dtype, shape, tuple(pieces[name])) for name, (dtype, shape, _) in staged.plan.items()
        },
    )


def _publish(folder: Path, temporary: Path, step: int, files: Files) -> Path | None:
    """Steps 6 and 7. Returns where a checkpoint of the same step was moved to."""
    final, replaced = folder / folder_name(step), None
    if os.path.lexists(final):
        replaced = folder / f"{final.name}.old-{secrets.token_hex(4)}"
        files.rename(final, replaced)
    try:
        files.rename(temporary, final)
    except BaseException:
        if replaced:
            files.rename(replaced, final)
        raise
    try:
        files.sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"{final} is complete, but fsync of {folder} failed: {error}; a power cut may undo it"
        ) from error
    return replaced


def _tidy(folder: Path, step: int, replaced: Path | None, keep: int, files: Files) -> None:
    """Steps 8 and 9. The checkpoint is safe already, so a failure here is a warning.

    Counted are checkpoints whose files are all there with the right sizes. One whose manifest cannot be read stays.
    """
    try:
        files.write_atomic(folder / LATEST, f"{folder_name(step)}\n".encode())
        kept = 0
        for path, manifest, _ in by_age(folder):
            if manifest is None:
                continue
            if _REPLACED.fullmatch(path.name) or kept >= keep:
                _remove(path, files)
            elif not file_problems(path, manifest, sorted(manifest.files), hashes=False):
                kept += 1
        if replaced and replaced.exists():
            _remove(replaced, files)
    except OSError as error:
        log.warning("%s is saved, but tidying up in %s failed: %s", folder_name(step), folder, error)


def _remove(path: Path, files: Files) -> None:
    """Under a temporary name first: what a kill leaves half removed is then never mistaken for a checkpoint."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.{temporary_suffix()}")
    files.rename(path, doomed)
    files.remove_tree(doomed)


def _try_to_remove(temporary: Path, files: Files) -> None:
    try:
        if os.path.lexists(temporary):
            files.remove_tree(temporary)
    except OSError as error:
        log.warning("%s could not be removed (%s); the next save will", temporary, error)
