"""The error of this package, and the few file operations that its modules share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DataError(ValueError):
    """Data on disk is missing, damaged or of another kind. The message is one sentence that names the file."""


class DiskFull(DataError):
    """Nothing is wrong with the data: there is no room for what is written. Commands end with 1, not 2."""


@contextlib.contextmanager
def disk_full_named(path: Path, written: int) -> Iterator[None]:
    """Turns "no space" and "file too large" from the system into a DiskFull. `written`: bytes that did fit before."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(
            f"{path}: {error.strerror} after {written:,} bytes; free some space or choose another folder"
        ) from error


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a small file so that `path` holds the old content or the new, never a part. Raises DiskFull."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with disk_full_named(path, 0), open(temporary, "wb") as file:
            file.write(content)
            flush_to_disk(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
