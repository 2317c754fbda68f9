"""A whole checkpoint in one safetensors file, and back. The file is read by anything that reads safetensors.

Tensors have their global names and whole shapes. The metadata key `megakern` holds the manifest of the checkpoint,
which signs itself and has a CRC-32 of each piece; `split` checks the tensors by it. Both work in blocks of bounded
size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megakern.parallel.blocks import Block
from megakern.parallel.context import DIMS, ParallelContext
from megakern.train.checkpoint_commit import Staged, commit, folder_name
from megakern.train.checkpoint_load import PieceReader, crc32, file_problems, newest
from megakern.train.checkpoint_plan import claim, parts_of, plan_of
from megakern.train.checkpoint_report import folder_of
from megakern.train.files import REAL, Files, temporary_suffix
from megakern.train.manifest import (
    DTYPES,
    CheckpointError,
    Manifest,
    TensorEntry,
    parse,
    read_manifest,
    render,
)

CHUNK_BYTES = 64 * 2**20
"""Rows of a tensor are copied in chunks of this many bytes, or one row where that has more."""

MAX_HEADER = 100_000_000
"""Bytes that a header may have, by the safetensors format."""

KEY = "megakern"


def merge(path: str | os.PathLike, out: str | os.PathLike, *, only: str | None = None, files: Files = REAL) -> str:
    """Writes the checkpoint at `path` (a run: its newest sound one) to the new file `out`; returns what was done.

    only: "model" takes the tensors whose names start with `model.`. Every hash is checked first. Memory: `CHUNK_BYTES`,
    or one row. Raises CheckpointError: `out` exists, the checkpoint is not sound, no space, a failed write.
    """
    path, out = Path(path), Path(out)
    _refuse_existing(out)
    folder, one = folder_of(path)
    source = path if one else newest(folder)
    manifest = read_manifest(source)
    if one and (problems := file_problems(source, manifest, sorted(manifest.files))):
        raise CheckpointError(f"{source} is damaged, nothing was merged:\n  " + "\n  ".join(problems))
    if only is not None:
        manifest = _part_of(manifest, only, source)
    order = sorted(manifest.tensors, key=lambda name: (-DTYPES[manifest.tensors[name].dtype][1], name))
    header = _header(manifest, order)
    size = len(header) + sum(_bytes_of(entry) for entry in manifest.tensors.values())
    temporary = out.with_name(f"{out.name}.{temporary_suffix()}")
    try:
        free = files.free_bytes(out.parent)
        if free < size:
            raise CheckpointError(f"no space in {out.parent}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
        with PieceReader(source) as reader:
            files.write_stream(temporary, chain([header], _chunks(manifest, order, reader)))
        _refuse_existing(out)
        files.rename(temporary, out)
        files.sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    finally:
        if os.path.lexists(temporary):
            files.unlink(temporary)
    return f"merged {source} into {out}: {len(order)} tensors, {size / 1e6:.1f} MB"


def split(file: str | os.PathLike, folder: str | os.PathLike, *, ranks: int = 1, files: Files = REAL) -> Path:
    """Makes the checkpoint `folder/step-XXXXXXXX` from a file that `merge` wrote; returns its path.

    ranks: each tensor is cut along its first dim into so many pieces, in as many shards. Any layout loads the result.
    Raises CheckpointError: not such a file, a damaged one, the checkpoint exists already, no space, a failed write.
    """
    file, folder = Path(file), Path(folder)
    if not 1 <= ranks <= 10**5:
        raise CheckpointError(f"--ranks must be from 1 to 100000, got {ranks}")
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "there is no such file"
        raise CheckpointError(f"{file}: {what}; name the .safetensors file that `megakern ckpt merge` made")
    try:
        with safe_open(file, framework="pt") as opened:
            manifest = _manifest_in(opened, file)
            final = folder / folder_name(manifest.step)
            _refuse_existing(final)
            tensors = {name: opened.get_tensor(name) for name in manifest.tensors}  # mapped, not read
            _refuse_damage(manifest, tensors, file)
            return commit(_staged(folder, manifest, tensors, ranks), ParallelContext(), files=files)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists already, and is not overwritten; name another --out, or remove it")


def _part_of(manifest: Manifest, only: str, source: Path) -> Manifest:
    tensors = {name: entry for name, entry in manifest.tensors.items() if name.startswith(f"{only}.")}
    if not tensors:
        groups = sorted({name.split(".")[0] for name in manifest.tensors})
        raise CheckpointError(f"{source} has no tensors of {only!r}; it has those of {', '.join(groups)}")
    used = {piece.file for entry in tensors.values() for piece in entry.pieces}
    return dataclasses.replace(
        manifest, tensors=tensors, files={name: entry for name, entry in manifest.files.items() if name in used}
    )


def _bytes_of(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * DTYPES[entry.dtype][1]


def _header(manifest: Manifest, order: list[str]) -> bytes:
    """The length and the JSON. Widest dtypes come first, so that each tensor starts at a multiple of its item size."""
    table: dict = {"__metadata__": {"format": "pt", KEY: render(manifest).decode()}}
    position = 0
    for name in order:
        entry = manifest.tensors[name]
        size = _bytes_of(entry)
        table[name] = {
            "dtype": DTYPES[entry.dtype][0],
            "shape": list(entry.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"the header would have {len(text)} bytes, a safetensors file may have {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _chunks(manifest: Manifest, order: list[str], reader: PieceReader) -> Iterator[memoryview]:
    """The bytes of the tensors one after the other."""
    for name in order:
        entry = manifest.tensors[name]
        for block in _row_blocks(entry.shape, DTYPES[entry.dtype][1]):
            chunk = torch.empty(block.shape, dtype=getattr(torch, entry.dtype))
            reader.copy(name, entry, block, chunk)
            yield memoryview(chunk.reshape(-1).view(torch.uint8).numpy())


def _row_blocks(shape: tuple[int, ...], item: int) -> Iterator[Block]:
    if math.prod(shape) == 0:
        return
    if not shape:
        yield Block((), (), ())
        return
    zeros = (0,) * (len(shape) - 1)
    rows = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * item))
    for start in range(0, shape[0], rows):
        yield Block((start, *zeros), (min(rows, shape[0] - start), *shape[1:]), (0, *zeros))


def _manifest_in(opened, file: Path) -> Manifest:
    raw = (opened.metadata() or {}).get(KEY)
    if raw is None:
        raise CheckpointError(f"{file} was not made by megakern ckpt merge: its metadata has no {KEY!r}")
    manifest = parse(raw.encode(), f"the manifest in {file}")
    if set(opened.keys()) != set(manifest.tensors):
        others = sorted(set(opened.keys()) ^ set(manifest.tensors))
        raise CheckpointError(f"{file} is damaged: its header and its manifest differ in {', '.join(others)}")
    for name, entry in manifest.tensors.items():
        stored = opened.get_slice(name)
        found = stored.get_dtype(), tuple(stored.get_shape())
        if found != (DTYPES[entry.dtype][0], entry.shape):
            raise CheckpointError(
                f"{file} is damaged: {name} is {found}, its manifest says {entry.dtype} {entry.shape}"
            )
    return manifest


def _refuse_damage(manifest: Manifest, tensors: dict[str, torch.Tensor], file: Path) -> None:
    damaged = [
        name
        for name, entry in manifest.tensors.items()
        for piece in entry.pieces
        if crc32(Block(piece.offsets, piece.shape, piece.offsets).of(tensors[name]).contiguous()) != piece.crc32
    ]
    if damaged:
        raise CheckpointError(f"{file} is damaged, nothing was made: {', '.join(dict.fromkeys(damaged))}")


def _staged(folder: Path, manifest: Manifest, tensors: dict[str, torch.Tensor], ranks: int) -> Staged:
    blocks = [{name: _rows_of(tensor, rank, ranks) for name, tensor in tensors.items()} for rank in range(ranks)]
    plan = plan_of(
        [[manifest.step, {name: claim(name, tensors[name], of[name]) for name in sorted(tensors)}] for of in blocks]
    )
    parts = chain.from_iterable(parts_of(tensors, of, plan, rank) for rank, of in enumerate(blocks))
    layout = {dim: ranks if dim == "dp" else 1 for dim in DIMS}  # the cut of FSDP
    return Staged(folder, manifest.step, manifest.state, plan, parts, layout, manifest.threads, keep=sys.maxsize)


def _rows_of(tensor: torch.Tensor, rank: int, ranks: int) -> list[Block]:
    """What `torch.chunk` along the first dim gives `rank`; a scalar is the first rank's."""
    if tensor.numel() == 0 or (tensor.ndim == 0 and rank > 0):
        return []
    if tensor.ndim == 0:
        return [Block((), (), ())]
    each = -(-len(tensor) // ranks)
    start, stop = min(rank * each, len(tensor)), min((rank + 1) * each, len(tensor))
    offsets = (start, *[0] * (tensor.ndim - 1))
    return [Block(offsets, (stop - start, *tensor.shape[1:]), offsets)] if start < stop else []
