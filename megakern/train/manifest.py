"""`manifest.json` of a checkpoint: what was saved, in which files, and the hashes that prove it.

The file is canonical JSON (sorted keys, no spaces) that carries the SHA-256 of itself without that field. A reader
renders what it parsed and compares bytes, so that one changed bit anywhere in the file is found. Everything in it is
checked before use: a manifest may come from a stranger.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "manifest.json"
SCHEMA = 1
MAX_BYTES = 256 * 2**20
"""Largest manifest that is read, in bytes: a million pieces."""

# dtype -> (name in a safetensors header, bytes an element)
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

CHECKPOINT_NAME = re.compile(r"step-(\d{8,15})(?:\.old-[0-9a-f]{8})?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,499}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"schema", "step", "sequence", "time", "state", "layout", "libraries", "threads", "files", "tensors", "sha256"}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, read or trusted. The message says what is wrong, and where."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint in the folder, not even a broken one."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: `shape` elements from `offsets` on, stored in `file` under `piece_key`."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor. Its pieces cover each element exactly once; a tensor with no elements has none."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileEntry:
    """`size` in bytes, `sha256` in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a checkpoint besides the numbers in its tensors."""

    step: int
    sequence: int
    """1 for the first checkpoint in a folder, then one more for each: the order of saving, whatever the steps are."""
    time: str
    """When it was saved, ISO 8601, UTC."""
    state: dict[str, Any]
    layout: dict[str, int]
    """Parallel sizes that saved it, by mesh dim."""
    libraries: dict[str, str]
    threads: int
    """`torch.get_num_threads()` when saving: another count gives other last bits."""
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def bytes(self) -> int:
        """Size of all shard files."""
        return sum(entry.size for entry in self.files.values())


def piece_key(name: str, entry_shape: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> str:
    """The name of a piece inside its file: the tensor's own when it is whole, else with the ranges, `w[0:4,8:16]`."""
    if tuple(shape) == tuple(entry_shape):
        return name
    return f"{name}[{','.join(f'{start}:{start + size}' for start, size in zip(offsets, shape, strict=True))}]"


def canonical(table: Any) -> bytes:
    """The one JSON text of `table`. Raises ValueError or TypeError for what JSON cannot say (NaN, sets, tensors)."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def render(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`."""
    return _sign({"schema": SCHEMA, **asdict(manifest)})


def _sign(table: dict[str, Any]) -> bytes:
    return canonical({**table, "sha256": hashlib.sha256(canonical(table)).hexdigest()}) + b"\n"


def read_manifest(path: str | Path) -> Manifest:
    """The checked manifest of the checkpoint folder `path`. Raises CheckpointError that names the file and fault."""
    folder = Path(path)
    file = folder / NAME
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a plain file; a checkpoint holds no links")
        if status.st_size > MAX_BYTES:
            raise CheckpointError(f"{file} has {status.st_size} bytes, more than the {MAX_BYTES} a manifest may have")
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file} is missing: not a checkpoint, or one that was never finished") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    manifest = parse(raw, str(file))
    named = CHECKPOINT_NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{file} is of step {manifest.step}, but its folder is called {folder.name}")
    return manifest


def parse(raw: bytes, source: str) -> Manifest:
    """The checked manifest in `raw`. Raises CheckpointError that starts with `source`."""
    check = _Check(source)
    try:
        table = json.loads(raw)
        check(isinstance(table, dict) and isinstance(table.get("sha256"), str), "it is not a signed JSON object")
        same = _sign({key: value for key, value in table.items() if key != "sha256"}) == raw
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: it is not canonical JSON ({error})") from error
    check(same, "its bytes do not match the SHA-256 it carries; it was changed after it was written")
    schema = table.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(f"{source} has schema {schema}, this megakern reads up to {SCHEMA}; use a newer megakern")
    check(type(schema) is int and schema == SCHEMA, f"schema must be {SCHEMA}, got {schema!r}")
    check(set(table) == _KEYS, f"its keys must be {sorted(_KEYS)}, got {sorted(table)}")
    files = {
        check.text(name, _FILE_NAME, "a file name"): check.file(name, entry)
        for name, entry in check.table(table["files"], "files").items()
    }
    tensors = {
        check.text(name, TENSOR_NAME, "a tensor name"): check.tensor(name, entry, files)
        for name, entry in check.table(table["tensors"], "tensors").items()
    }
    check.sizes(files, tensors)
    layout = check.table(table["layout"], "layout")
    libraries = check.table(table["libraries"], "libraries")
    for name, value in libraries.items():
        check(isinstance(value, str) and len(value) < 200, f"libraries.{name} must be a short text, got {value!r}")
    return Manifest(
        step=check.whole(table["step"], "step"),
        sequence=check.whole(table["sequence"], "sequence"),
        time=check.time(table["time"]),
        state=check.table(table["state"], "state"),
        layout={name: check.whole(size, f"layout.{name}") for name, size in layout.items()},
        libraries=libraries,
        threads=check.whole(table["threads"], "threads"),
        files=files,
        tensors=tensors,
    )


class _Check:
    """Checks of values that came from a file. Each raises CheckpointError that names the file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, condition: bool, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{self.source} is damaged: {message}")

    def table(self, value: Any, what: str) -> dict[str, Any]:
        self(isinstance(value, dict), f"{what} must be an object, got {type(value).__name__}")
        return value

    def whole(self, value: Any, what: str, limit: int = 2**63) -> int:
        right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
        self(right, f"{what} must be a whole number in [0, {limit}), got {value!r}")
        return value

    def text(self, value: Any, pattern: re.Pattern[str], what: str) -> str:
        self(
            isinstance(value, str) and pattern.fullmatch(value) is not None and ".." not in value,
            f"{str(value)[:200]!r} cannot be {what}: it must match {pattern.pattern}, and hold no '..'",
        )
        return value

    def time(self, value: Any) -> str:
        try:
            datetime.fromisoformat(value)
        except (TypeError, ValueError):
            self(False, f"time must be an ISO 8601 time, got {value!r}")
        return value

    def wholes(self, value: Any, what: str) -> tuple[int, ...]:
        self(isinstance(value, list) and len(value) <= 64, f"{what} must be a list of at most 64 whole numbers")
        return tuple(self.whole(item, what) for item in value)

    def file(self, name: str, entry: Any) -> FileEntry:
        self(set(self.table(entry, name)) == {"size", "sha256"}, f"file {name} must have size and sha256")
        sha256 = self.text(entry["sha256"], _SHA256, f"the sha256 of {name}")
        return FileEntry(self.whole(entry["size"], f"size of {name}"), sha256)

    def tensor(self, name: str, entry: Any, files: dict[str, FileEntry]) -> TensorEntry:
        self(set(self.table(entry, name)) == {"dtype", "shape", "pieces"}, f"{name} must have dtype, shape and pieces")
        dtype = entry["dtype"]
        self(isinstance(dtype, str) and dtype in DTYPES, f"{name} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
        shape = self.wholes(entry["shape"], f"shape of {name}")
        self(math.prod(shape) < 2**63, f"{name} of shape {shape} has too many elements")
        self(isinstance(entry["pieces"], list), f"pieces of {name} must be a list")
        pieces = tuple(self.piece(name, piece, files) for piece in entry["pieces"])
        fault = tiling_fault(shape, [(piece.offsets, piece.shape) for piece in pieces])
        self(fault is None, f"{name}: {fault}")
        return TensorEntry(dtype, shape, pieces)

    def piece(self, name: str, piece: Any, files: dict[str, FileEntry]) -> Piece:
        what = f"a piece of {name}"
        self(
            set(self.table(piece, what)) == {"file", "offsets", "shape", "crc32"},
            f"{what} must have file, offsets, shape and crc32",
        )
        self(
            isinstance(piece["file"], str) and piece["file"] in files,
            f"{what} is in {piece['file']!r}, not a file of it",
        )
        offsets, shape = self.wholes(piece["offsets"], what), self.wholes(piece["shape"], what)
        return Piece(piece["file"], offsets, shape, self.whole(piece["crc32"], f"crc32 of {what}", 2**32))

    def sizes(self, files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> None:
        """What the pieces claim fits into the files, so that nothing larger than the files is ever allocated."""
        claimed = dict.fromkeys(files, 0)
        for entry in tensors.values():
            for piece in entry.pieces:
                claimed[piece.file] += math.prod(piece.shape) * DTYPES[entry.dtype][1]
        for name, size in claimed.items():
            self(size <= files[name].size, f"pieces of {size} bytes cannot be in {name} of {files[name].size} bytes")
        used = {piece.file for entry in tensors.values() for piece in entry.pieces}
        self(used == set(files), f"no tensor uses {sorted(set(files) - used)}")


def tiling_fault(shape: Sequence[int], pieces: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """Why the (offsets, shape) `pieces` do not cover each element of `shape` exactly once; None when they do."""
    pieces = list(pieces)
    for offsets, size in pieces:
        if len(offsets) != len(shape) or len(size) != len(shape):
            return f"a piece at {tuple(offsets)} of shape {tuple(size)} has another number of dims than {tuple(shape)}"
        if any(extent < 1 for extent in size):
            return f"a piece at {tuple(offsets)} is empty"
        if any(start < 0 or start + extent > whole for start, extent, whole in zip(offsets, size, shape, strict=True)):
            return f"a piece at {tuple(offsets)} of shape {tuple(size)} is out of {tuple(shape)}"
    covered, wanted = sum(math.prod(size) for _, size in pieces), math.prod(shape)
    if covered != wanted:
        return f"its pieces have {covered} elements, the tensor has {wanted}"
    # Equal counts, all inside: they tile when no two overlap. Sorted along the dim that is cut most, few pairs remain.
    dim = max(range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in pieces}), default=0)
    if len(shape):
        pieces.sort(key=lambda piece: piece[0][dim])
    for index, (offsets, size) in enumerate(pieces):
        for others, extent in pieces[index + 1 :]:
            if len(shape) and others[dim] >= offsets[dim] + size[dim]:
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(offsets, size, others, extent, strict=True)):
                return f"pieces at {tuple(offsets)} and {tuple(others)} overlap"
    return None
