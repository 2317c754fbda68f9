"""Reading checkpoints: which one is the newest sound one, what is wrong with another, and loading into any layout."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megakern.parallel.blocks import Block, blocks_of, local_of
from megakern.parallel.context import ParallelContext
from megakern.train.checkpoint_ranks import Phase
from megakern.train.manifest import (
    CHECKPOINT_NAME,
    DTYPES,
    NAME,
    CheckpointError,
    Manifest,
    NoCheckpointError,
    Piece,
    TensorEntry,
    piece_key,
    read_manifest,
)

log = logging.getLogger("megakern")

LATEST = "latest"
READ_BYTES = 4 * 2**20  # at a time, when hashing


def newest(folder: str | os.PathLike, parallel: ParallelContext | None = None) -> Path:
    """The checkpoint in `folder` that was saved last and is sound: manifest there, and every hash right.

    A newer one that is not sound is passed over, with a warning that says what is wrong with it. "Last" is the order of
    saving, not the step: after going back to an older step, what is saved from there on is newer. `parallel`: the ranks
    share the hashing and get the same answer.

    Raises NoCheckpointError when there is none, CheckpointError when there are only broken ones.
    """
    parallel = parallel or ParallelContext()
    folder = Path(folder)
    with Phase(parallel, f"looking for checkpoints in {folder}") as phase:
        if parallel.world_rank == 0:
            phase.value = [[path.name, fault] for path, _, fault in by_age(folder)]
    broken = []
    for name, fault in phase.values[0]:
        problems = [fault] if fault else sharing_problems(folder / name, parallel)
        if not problems:
            _warn_of_hint(folder, name, parallel)
            return folder / name
        broken.append(f"{name}: {'; '.join(problems)}")
        if parallel.world_rank == 0:
            log.warning("checkpoint %s is not sound, looking for an older one: %s", folder / name, "; ".join(problems))
    if broken:
        raise CheckpointError(f"no sound checkpoint in {folder}: " + " | ".join(broken))
    raise NoCheckpointError(f"no checkpoint in {folder}; name the folder of a run, or one of its ckpt/step-XXXXXXXX")


def by_age(folder: Path) -> list[tuple[Path, Manifest | None, str | None]]:
    """(path, manifest, what is wrong with that) of each checkpoint: unreadable ones, then last saved first."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not CHECKPOINT_NAME.fullmatch(path.name):
            continue
        try:
            found.append((path, read_manifest(path), None))
        except CheckpointError as error:
            found.append((path, None, str(error)))
    found.sort(key=lambda item: (item[1] is None, item[1].sequence if item[1] else 0, item[0].name), reverse=True)
    return found


def _warn_of_hint(folder: Path, chosen: str, parallel: ParallelContext) -> None:
    """`latest` is for people and scripts; when it names another checkpoint, say so."""
    if parallel.world_rank != 0:
        return
    try:
        hint = (folder / LATEST).read_bytes()[:100].decode("ascii", "replace").strip()
    except OSError:
        return
    if hint != chosen:
        log.warning("%s names %r, but the newest sound checkpoint is %s", folder / LATEST, hint, chosen)


def verify(path: str | os.PathLike) -> list[str]:
    """Every problem of the checkpoint at `path`, with its file, and the tensor if it can; [] when it is sound."""
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return file_problems(path, manifest, sorted(manifest.files)) + [
        f"{name}: extra, the manifest does not know it" for name in extra_files(path, manifest)
    ]


def extra_files(path: Path, manifest: Manifest) -> list[str]:
    """Names in the folder that the manifest does not list. They are never read."""
    return sorted(set(os.listdir(path)) - set(manifest.files) - {NAME})


def sharing_problems(path: Path, parallel: ParallelContext) -> list[str]:
    """What is wrong with the checkpoint at `path`, the same on every rank: each hashes its share of the files."""
    with Phase(parallel, f"checking {path}") as phase:
        try:
            manifest = read_manifest(path)
            share = sorted(manifest.files)[parallel.world_rank :: parallel.world_size]
            phase.value = file_problems(path, manifest, share)
        except CheckpointError as error:
            phase.value = [str(error)]
    return list(dict.fromkeys(problem for problems in phase.values for problem in problems))


def file_problems(path: Path, manifest: Manifest, names: list[str], *, hashes: bool = True) -> list[str]:
    """What is wrong with the files `names`: missing, a link, another size, another hash (then also which tensors)."""
    problems = []
    for name in names:
        entry = manifest.files[name]
        try:
            status = (path / name).lstat()
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"{name}: not a plain file; a checkpoint holds no links")
            elif status.st_size != entry.size:
                problems.append(f"{name}: {status.st_size} bytes, the manifest says {entry.size}")
            elif hashes and _sha256(path / name) != entry.sha256:
                problems.append(
                    f"{name}: its SHA-256 is not the one in the manifest; {_what_differs(path, name, manifest)}"
                )
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror}")
    return problems


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def crc32(tensor: torch.Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else 0


def _what_differs(path: Path, name: str, manifest: Manifest) -> str:
    """Which tensors of a damaged file are wrong, for the message. The file is not used for anything else."""
    wrong = []
    try:
        with safe_open(path / name, framework="pt") as file:
            keys = set(file.keys())
            for tensor, entry in manifest.tensors.items():
                for piece in entry.pieces:
                    if piece.file != name:
                        continue
                    key = piece_key(tensor, entry.shape, piece.offsets, piece.shape)
                    if key not in keys or crc32(file.get_tensor(key).contiguous()) != piece.crc32:
                        wrong.append(key)
    except (SafetensorError, OSError) as error:
        return f"its header is damaged ({error})"
    return f"damaged: {', '.join(wrong)}" if wrong else "its header is damaged, the tensors are as saved"


def load(
    path: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    parallel: ParallelContext,
    *,
    cast: bool = False,
    only: str | None = None,
) -> dict:
    """Fills `tensors` in place from the checkpoint at `path`, whatever layout saved it, and returns its state.

    Each rank passes its own tensors (DTensor, or plain = the whole). Every file is hashed before anything is changed,
    and all that does not fit is listed in one error: missing, extra, other shape, other dtype. `cast=True` allows
    another floating dtype. `only="model."`: saved names that do not start so need no place in `tensors`. Memory: the
    files are mapped; at most one piece of a tensor is copied at a time.

    Raises CheckpointError, the same on every rank. Before the error of a check, no tensor was changed.
    """
    path = Path(path)
    doing = f"loading {path}"
    with Phase(parallel, doing) as phase:
        manifest = read_manifest(path)
        phase.value = [sorted(tensors), manifest.sequence, manifest.time]
    wanted = {name for names, _, _ in phase.values for name in names}
    with Phase(parallel, doing):
        if any(value[1:] != phase.values[0][1:] for value in phase.values):
            raise CheckpointError(
                "the ranks see different checkpoints there; the folder must be on a file system they share"
            )
        problems = _misfits(manifest, tensors, wanted, cast, only)
        if problems:
            raise CheckpointError("it does not fit:\n  " + "\n  ".join(problems))
    problems = sharing_problems(path, parallel)
    if problems:
        raise CheckpointError(f"{doing} failed: it is damaged, nothing was loaded:\n  " + "\n  ".join(problems))
    if parallel.world_rank == 0:
        if extra := extra_files(path, manifest):
            log.warning("%s holds files that the manifest does not know, not read: %s", path, ", ".join(extra))
        if only is None and manifest.threads != torch.get_num_threads():  # matters to a run that goes on
            log.warning(
                "%s was saved with %d threads, this process has %d: the run goes on, but not with the same last bits",
                path,
                manifest.threads,
                torch.get_num_threads(),
            )
    with Phase(parallel, doing):
        _fill(path, manifest, tensors)
    return manifest.state


def require_tokenizer(state: dict, sha256: str, path: str | os.PathLike) -> None:
    """Raises CheckpointError when the run that saved `state` at `path` had another tokenizer than `sha256`."""
    saved = state.get("tokenizer_sha256")
    if saved != sha256:
        raise CheckpointError(
            f"{path} had another tokenizer (sha256 {str(saved)[:12]}...) than the data ({sha256[:12]}...): "
            "the same token ids mean other text; use data prepared with the tokenizer it was trained with"
        )


def _misfits(
    manifest: Manifest, tensors: dict[str, torch.Tensor], wanted: set[str], cast: bool, only: str | None
) -> list[str]:
    """Every way in which the saved tensors are not the wanted ones. `wanted`: the names on any rank."""
    saved = manifest.tensors
    missing = sorted(set(tensors) - set(saved))
    extra = sorted(name for name in set(saved) - wanted if name.startswith(only or ""))
    problems = [f"missing in the checkpoint: {name}" for name in missing]
    problems += [f"only in the checkpoint: {name} {list(saved[name].shape)} {saved[name].dtype}" for name in extra]
    for name in sorted(set(tensors) & set(saved)):
        entry, tensor = saved[name], tensors[name]
        dtype = _dtype_name(tensor.dtype)
        if entry.shape != tuple(tensor.shape):
            problems.append(f"{name}: saved with shape {list(entry.shape)}, wanted {list(tensor.shape)}")
        if entry.dtype != dtype:
            floating = "float" in entry.dtype and tensor.dtype.is_floating_point
            if not floating:
                problems.append(f"{name}: saved as {entry.dtype}, wanted {dtype}; these are never converted")
            elif not cast:
                problems.append(f"{name}: saved as {entry.dtype}, wanted {dtype}; cast=True converts")
    return problems


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill(path: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    with PieceReader(path) as reader, torch.no_grad():
        for name, tensor in tensors.items():
            for block in blocks_of(name, tensor):
                reader.copy(name, manifest.tensors[name], block, local_of(tensor))


class PieceReader:
    """`with PieceReader(path) as reader:` copies blocks of whole tensors out of the pieces of a checkpoint.

    Files are mapped and stay open within the block; at most one piece is in memory at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack, self._opened = ExitStack(), {}

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copy(self, name: str, entry: TensorEntry, block: Block, into: torch.Tensor) -> None:
        """Fills the place of `block` in `into`. Raises CheckpointError when a file is not as the manifest says."""
        for piece in entry.pieces:
            cut = _intersection(block, piece)
            if cut is None:
                continue
            if piece.file not in self._opened:
                opened = self._stack.enter_context(safe_open(self.path / piece.file, framework="pt"))
                self._opened[piece.file] = opened
            target = into[tuple(slice(s + k, e + k) for (s, e), k in zip(cut, _shift(block), strict=True))]
            target.copy_(_read(self._opened[piece.file], name, entry, piece, cut))


def _intersection(block: Block, piece: Piece) -> list[tuple[int, int]] | None:
    """(start, stop) in the whole tensor, for each dim, of what both hold."""
    cut = []
    for a, n, b, m in zip(block.offsets, block.shape, piece.offsets, piece.shape, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        cut.append((start, stop))
    return cut


def _shift(block: Block) -> list[int]:
    """What to add to a place in the whole tensor to get the place in this rank's."""
    return [local - offset for local, offset in zip(block.local, block.offsets, strict=True)]


def _read(file, name: str, entry: TensorEntry, piece: Piece, cut: list[tuple[int, int]]) -> torch.Tensor:
    key = piece_key(name, entry.shape, piece.offsets, piece.shape)
    stored = file.get_slice(key)
    if tuple(stored.get_shape()) != piece.shape or stored.get_dtype() != DTYPES[entry.dtype][0]:
        raise CheckpointError(
            f"{piece.file}: {key} is {stored.get_dtype()} {stored.get_shape()}, "
            f"the manifest says {entry.dtype} {list(piece.shape)}"
        )
    return stored[tuple(slice(s - offset, e - offset) for (s, e), offset in zip(cut, piece.offsets, strict=True))]
