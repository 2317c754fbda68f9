"""Help for the tests of checkpoints: sample tensors, file operations that fail on demand, and child processes."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.files import Files

ONE = ParallelContext()


def sample(seed: int) -> dict[str, torch.Tensor]:
    """Tensors whose every value depends on `seed`, so that a mix of two checkpoints equals neither."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.w": normal(6, 8),
        "model.half": normal(5, 3).bfloat16(),
        "model.bias": normal(7).half(),
        "optimizer.exp_avg.w": normal(6, 8),
        "optimizer.step": torch.tensor(seed),
        "data.order": torch.randperm(50, generator=generator),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits; NaN equals itself."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and bytes(a[n].contiguous().reshape(-1).view(torch.uint8).numpy())
        == bytes(b[n].contiguous().reshape(-1).view(torch.uint8).numpy())
        for n in a
    )


def damage(path: Path) -> None:
    """Flips one bit of the last byte of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


class UnsyncedFiles(Files):
    """Without fsync, which takes most of the time of a small save, and which only a power cut can show."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


UNSYNCED = UnsyncedFiles()


def save_sample(folder: Path, step: int, seed: int, files: Files = UNSYNCED, **options) -> Path:
    """A checkpoint of `step` that holds `sample(seed)`, and says so in its state."""
    return checkpoint.save(folder, step, sample(seed), {"step": step, "seed": seed}, ONE, files=files, **options)


def loaded_seed(path: Path) -> int:
    """Loads what `save_sample` saved and returns its seed. Fails unless every bit is that of one sample."""
    tensors = blank(sample(0))
    state = checkpoint.load(path, tensors, ONE)
    assert same_bits(tensors, sample(state["seed"])), f"{path} holds a mix"
    return state["seed"]


class FaultyFiles(UnsyncedFiles):
    """The k-th operation fails (k from 0; none for k < 0). `kind`:

    error     raises ENOSPC                              error-on   so does each one after it
    exit      the process dies before the operation      late-exit  right after it
    short     a write takes half, which is allowed       torn       a write takes half, then raises ENOSPC
    torn-exit a write takes half, then the process dies  lie        a write takes half and says it took all
    An operation that is not a write does nothing special under short, torn, torn-exit and lie.
    `names` are those of the operations so far.
    """

    def __init__(self, k: int, kind: str) -> None:
        self.k, self.kind, self.count = k, kind, 0
        self.names: list[str] = []

    def _run(self, name: str, *arguments):
        index, self.count = self.count, self.count + 1
        self.names.append(name)
        real = getattr(super(), name)
        hit = index == self.k or (self.kind == "error-on" and 0 <= self.k <= index)
        if not hit:
            return real(*arguments)
        if self.kind in ("error", "error-on"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        if self.kind == "exit":
            os._exit(9)
        if self.kind == "late-exit":
            real(*arguments)
            os._exit(9)
        if name != "write":
            return real(*arguments)
        descriptor, data = arguments
        taken = real(descriptor, data[: len(data) // 2])
        if self.kind == "torn":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.kind == "torn-exit":
            os._exit(9)
        return len(data) if self.kind == "lie" else taken


def _counted(name: str):
    return lambda self, *arguments: self._run(name, *arguments)


for _name in (
    *("make_folder", "create", "write", "sync", "close", "sync_folder"),
    *("rename", "replace", "unlink", "remove_folder", "free_bytes"),
):
    setattr(FaultyFiles, _name, _counted(_name))


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Runs `work` in a forked child. Returns its exit code (0: it returned), and what it returned or its trace."""
    pid, out = start_child(work)
    with os.fdopen(out, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def start_child(work: Callable[[], object]) -> tuple[int, int]:
    """(process id, descriptor to read its text from) of a forked child that runs `work`."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    code = 1
    try:
        os.close(out)
        text = str(work())
        code = 0
    except BaseException:  # noqa: BLE001 - the trace is for the parent
        text = traceback.format_exc()
    finally:
        os.write(into, text.encode())
        os._exit(code)
