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

import hashlib
import json
import logging
import math
import os
import platform
import re
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as safetensors_bytes

import megakern
from megakern.parallel.blocks import Block, blocks_of, local_of
from megakern.parallel.context import DIMS, ParallelContext
from megakern.train.checkpoint_load import (
    LATEST,
    by_age,
    crc32,
    file_problems,
    load,
    newest,
    require_tokenizer,
    verify,
)
from megakern.train.checkpoint_ranks import Phase
from megakern.train.checkpoint_report import Listed, listing, report, show
from megakern.train.files import REAL, Files, temporary_suffix
from megakern.train.manifest import (
    DTYPES,
    NAME,
    TENSOR_NAME,
    CheckpointError,
    FileEntry,
    Manifest,
    NoCheckpointError,
    Piece,
    TensorEntry,
    canonical,
    parse,
    piece_key,
    read_manifest,
    render,
    tiling_fault,
)

__all__ = [
    "CheckpointError",
    "Listed",
    "Manifest",
    "NoCheckpointError",
    "folder_name",
    "listing",
    "load",
    "newest",
    "read_manifest",
    "report",
    "require_tokenizer",
    "save",
    "show",
    "verify",
]

log = logging.getLogger("megakern")

PART_BYTES = 512 * 2**20
"""A rank starts a new file when the next piece would bring the file above this many bytes."""

FINITE = ("model.", "optimizer.")
"""Tensors whose names start so must be finite."""

_STALE = re.compile(rf"(step-\d{{8,15}}|{LATEST})\.tmp-[0-9a-f]{{8}}")
_REPLACED = re.compile(r"(step-\d{8,15})\.old-[0-9a-f]{8}")


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

    Raises CheckpointError, the same on every rank: non-finite values in model or optimizer, no space, a failed write.
    Then older checkpoints are as they were, and nothing new is left behind. Only when the fsync of `folder` fails is
    the new one there already.
    """
    folder = Path(folder)
    doing = f"saving step {step} to {folder}"
    with Phase(parallel, doing) as phase:
        if keep < 2:
            raise CheckpointError(f"keep must be 2 or more, got {keep}: one checkpoint alone has no fallback")
        if not 0 <= step < 10**15:
            raise CheckpointError(f"step must be in [0, 10^15), got {step}")
        state = _plain_state(state)
        _refuse_non_finite(tensors)
        phase.value = [step, {name: _claim(name, tensor) for name, tensor in sorted(tensors.items())}]
    plan = _plan(phase.values)
    with Phase(parallel, doing) as phase:
        if parallel.world_rank == 0:
            phase.value = _prepare(folder, step, _bytes_needed(plan, state), files)
    temporary = folder / phase.values[0]
    try:
        with Phase(parallel, doing) as phase:
            phase.value = _write_pieces(temporary, tensors, plan, parallel.world_rank, files)
        with Phase(parallel, doing):
            if parallel.world_rank == 0:
                manifest = _manifest(folder, step, state, plan, phase.values, parallel)
                raw = render(manifest)
                parse(raw, "what was to be saved")  # never publish what cannot be read
                _write(temporary / NAME, raw, files)
                files.sync_folder(temporary)
                replaced = _publish(folder, temporary, step, files)
    except BaseException:
        if parallel.world_rank == 0:
            _try_to_remove(temporary, files)
        raise
    with Phase(parallel, doing):
        if parallel.world_rank == 0:
            _tidy(folder, step, replaced, keep, files)
    return folder / folder_name(step)


def folder_name(step: int) -> str:
    """The name of the folder of `step`."""
    return f"step-{step:08d}"


def _plain_state(state: dict[str, Any]) -> dict[str, Any]:
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


def _refuse_non_finite(tensors: dict[str, torch.Tensor]) -> None:
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


def _claim(name: str, tensor: torch.Tensor) -> list:
    """[dtype, shape of the whole, [[offsets, shape] of each block that this rank holds]]."""
    if not TENSOR_NAME.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{name!r} cannot be a tensor name: it must match {TENSOR_NAME.pattern}, and hold no '..'"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is {dtype}; a checkpoint can hold {', '.join(DTYPES)}")
    return [dtype, list(tensor.shape), [[block.offsets, block.shape] for block in blocks_of(name, tensor)]]


# name -> (dtype, shape of the whole, {(offsets, shape): the rank that writes it})
Plan = dict[str, tuple[str, tuple[int, ...], dict[tuple[tuple[int, ...], tuple[int, ...]], int]]]


def _plan(claims: list) -> Plan:
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


def _bytes_needed(plan: Plan, state: dict[str, Any]) -> int:
    """The size of the checkpoint in bytes, rounded up: tensors, and an allowance for headers and the manifest."""
    data = sum(math.prod(shape) * DTYPES[dtype][1] for dtype, shape, _ in plan.values())
    pieces = sum(len(blocks) + 1 for _, _, blocks in plan.values())
    return data + 1000 * pieces + len(canonical(state)) + 2**16


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


def _write_pieces(temporary: Path, tensors: dict[str, torch.Tensor], plan: Plan, rank: int, files: Files) -> list:
    """Writes this rank's pieces. Returns [{file: [size, sha256]}, [[name, file, offsets, shape, crc32] of each]]."""
    written, pieces = {}, []
    for number, blocks in enumerate(_parts(tensors, plan, rank)):
        file = f"rank-{rank:05d}-part-{number:03d}.safetensors"
        part: dict[str, torch.Tensor] = {}
        for name, block in blocks:
            data = _own(block, tensors[name], part)
            part[piece_key(name, plan[name][1], block.offsets, block.shape)] = data
            pieces.append([name, file, block.offsets, block.shape, crc32(data)])
        data = safetensors_bytes(part, {"format": "pt"})
        _write(temporary / file, data, files)
        written[file] = [len(data), hashlib.sha256(data).hexdigest()]
    return [written, pieces]


def _parts(tensors: dict[str, torch.Tensor], plan: Plan, rank: int) -> list[list[tuple[str, Block]]]:
    """What this rank writes, cut into files of at most PART_BYTES where a single piece is not larger."""
    parts: list[list[tuple[str, Block]]] = []
    room = 0
    for name, tensor in sorted(tensors.items()):
        for block in blocks_of(name, tensor):
            if plan[name][2][block.offsets, block.shape] != rank:
                continue
            size = math.prod(block.shape) * tensor.dtype.itemsize
            if not parts or size > room:
                parts.append([])
                room = PART_BYTES
            parts[-1].append((name, block))
            room -= size
    return parts


def _own(block: Block, tensor: torch.Tensor, part: dict[str, torch.Tensor]) -> torch.Tensor:
    """The block in host memory, contiguous. Tied tensors are copied: safetensors refuses two names for one memory."""
    data = block.of(local_of(tensor)).cpu().contiguous()
    memory = data.untyped_storage().data_ptr()
    shared = any(other.untyped_storage().data_ptr() == memory for other in part.values())
    return data.clone() if shared else data


def _manifest(
    folder: Path, step: int, state: dict[str, Any], plan: Plan, written: list, parallel: ParallelContext
) -> Manifest:
    pieces: dict[str, list[Piece]] = {name: [] for name in plan}
    for _, rank_pieces in written:
        for name, file, offsets, shape, crc in rank_pieces:
            pieces[name].append(Piece(file, tuple(offsets), tuple(shape), crc))
    return Manifest(
        step=step,
        sequence=1 + max((manifest.sequence for _, manifest, _ in by_age(folder) if manifest), default=0),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        state=state,
        layout={dim: parallel.size(dim) for dim in DIMS},
        libraries={
            "megakern": megakern.__version__,
            "python": platform.python_version(),
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
        },
        threads=torch.get_num_threads(),
        files={file: FileEntry(*entry) for rank_files, _ in written for file, entry in rank_files.items()},
        tensors={name: TensorEntry(dtype, shape, tuple(pieces[name])) for name, (dtype, shape, _) in plan.items()},
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
