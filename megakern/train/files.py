"""The few file operations a run depends on, in one object, so that a test can make each of them fail; and a lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path


class Files:
    """Writes files so that they survive a power cut: new file, write all of it, fsync, check the size.

    The first group of methods is what touches the disk, one system call each; a test overrides those.
    """

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A descriptor of a file that did not exist before: a link planted under that name is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """How many bytes were taken: the system may take fewer than it was given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable: a rename is not, before this."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    # Made of the above.

    def write_file(self, path: Path, data: bytes) -> None:
        """A new file at `path` that holds `data` and is on the disk. Raises OSError that names `path`."""
        self.write_stream(path, [data])

    def write_stream(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """A new file at `path` that holds `chunks` one after the other. Raises OSError that names `path`."""
        wanted = 0
        try:
            descriptor = self.create(path)
            try:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    wanted += rest.nbytes
                    while rest:
                        taken = self.write(descriptor, rest)
                        if taken <= 0:
                            raise OSError(errno.EIO, "the disk takes no more bytes")
                        rest = rest[taken:]
                self.sync(descriptor)
                size = os.fstat(descriptor).st_size
            finally:
                self.close(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        if size != wanted:
            raise OSError(errno.EIO, f"{wanted} bytes were written, the file has {size}", str(path))

    def write_atomic(self, path: Path, data: bytes) -> None:
        """`path` holds `data`, or what it held before: never a part. Raises OSError; a temporary file is removed."""
        temporary = path.with_name(f"{path.name}.{temporary_suffix()}")
        try:
            self.write_file(temporary, data)
            self.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                self.unlink(temporary)
            raise
        self.sync_folder(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Removes a flat folder, or the link or file that stands in its place. Raises OSError."""
        if path.is_symlink() or not path.is_dir():
            self.unlink(path)
            return
        for name in sorted(os.listdir(path)):
            self.unlink(path / name)
        self.remove_folder(path)


REAL = Files()


def temporary_suffix() -> str:
    """`tmp-` and eight random hex digits. A name that ends so is never read, and may be removed."""
    return f"tmp-{secrets.token_hex(4)}"


def write_atomic(path: str | os.PathLike, data: bytes, files: Files = REAL) -> None:
    """`path` holds `data` durably, or what it held before: never a part. Raises OSError."""
    files.write_atomic(Path(path), data)


class RunInUseError(RuntimeError):
    """Another process writes to this run folder. The message names it."""


class RunLock:
    """`with RunLock(folder):` holds `folder/lock`, so that two runs never write to one folder.

    The system drops the lock when the process ends, however it ends: a lock file that is left behind locks nothing.
    Raises RunInUseError when another process holds it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / "lock"
        self._descriptor: int | None = None
        # A forked worker inherits the descriptor, and would keep the lock alive after this process was killed.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                os.read(descriptor, 200).decode("utf-8", "replace").strip() or "a process that did not say its name"
            )
            os.close(descriptor)
            raise RunInUseError(
                f"another run writes to {self.path.parent}: {holder} holds {self.path.name}; "
                "stop that run, or choose another run folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
