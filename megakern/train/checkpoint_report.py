"""What `megakern ckpt` prints: the checkpoints of a run, what one holds, and whether they are sound."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megakern.train.checkpoint_load import by_age, file_problems, newest, verify
from megakern.train.manifest import CHECKPOINT_NAME, NAME, NoCheckpointError, read_manifest


@dataclass(frozen=True)
class Listed:
    """One line of `megakern ckpt ls`."""

    path: Path
    step: int
    bytes: int
    valid: bool
    when: str
    problem: str | None


def listing(folder: str | os.PathLike, *, deep: bool = False) -> list[Listed]:
    """The checkpoints in `folder`, last saved first. `deep` hashes the files; else presence and size count."""
    found = []
    for path, manifest, fault in by_age(Path(folder)):
        if manifest is None:
            found.append(Listed(path, int(CHECKPOINT_NAME.fullmatch(path.name)[1]), 0, False, "", fault))
            continue
        problems = file_problems(path, manifest, sorted(manifest.files), hashes=deep)
        found.append(
            Listed(path, manifest.step, manifest.bytes, not problems, manifest.time, "; ".join(problems) or None)
        )
    return found


def show(path: str | os.PathLike) -> str:
    """What the checkpoint at `path` holds, for people: state, layout, libraries, tensors. Raises CheckpointError."""
    manifest = read_manifest(path)
    lines = [
        f"step {manifest.step}, saved {manifest.time}, {manifest.bytes / 1e6:.1f} MB in {len(manifest.files)} files",
        "layout    " + " ".join(f"{dim}={size}" for dim, size in manifest.layout.items()),
        "libraries " + " ".join(f"{name}={version}" for name, version in sorted(manifest.libraries.items())),
        f"threads   {manifest.threads}",
        "state",
        *(f"  {key} = {_short(value)}" for key, value in sorted(manifest.state.items())),
        f"tensors ({len(manifest.tensors)})",
    ]
    for name, entry in sorted(manifest.tensors.items()):
        pieces = "" if len(entry.pieces) <= 1 else f"  in {len(entry.pieces)} pieces of {list(entry.pieces[0].shape)}"
        lines.append(f"  {name}  {entry.dtype} {list(entry.shape)}{pieces}")
    return "\n".join(lines)


def _short(value: object, length: int = 100) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def folder_of(path: Path) -> tuple[Path, bool]:
    """(the folder of checkpoints, is `path` itself one?) for a run, its folder of checkpoints, or one of them."""
    if CHECKPOINT_NAME.fullmatch(path.name) is not None or (path / NAME).exists():
        return path.parent, True
    return (path / "ckpt" if (path / "ckpt").is_dir() else path), False


def report(action: str, path: str | os.PathLike) -> tuple[str, bool]:
    """(text, all is sound) of `ls`, `show` or `verify` for a run, its folder of checkpoints, or one checkpoint.

    `ls` looks at names and sizes, `verify` hashes everything, `show` describes one: the newest sound one of a run.
    Raises CheckpointError when there is none.
    """
    path = Path(path)
    folder, one = folder_of(path)
    if action == "show":
        return show(path if one else newest(folder)), True
    found = [item for item in listing(folder) if not one or item.path.name == path.name]
    if not found:
        raise NoCheckpointError(f"no checkpoint in {path}; name the folder of a run, or one of its ckpt/step-XXXXXXXX")
    if action == "ls":
        lines = [
            f"{item.path.name}  {item.bytes / 1e6:9.1f} MB  {item.when or 'unknown time'}  {item.problem or 'complete'}"
            for item in found
        ]
        return "\n".join(lines), all(item.valid for item in found)
    if action != "verify":
        raise ValueError(f"action must be ls, show or verify, got {action!r}")
    problems = {item.path.name: verify(item.path) for item in found}
    lines = [
        f"{name}: sound" if not faults else "\n  ".join([f"{name}:", *faults]) for name, faults in problems.items()
    ]
    return "\n".join(lines), not any(problems.values())
