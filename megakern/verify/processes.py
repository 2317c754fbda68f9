"""The processes of one layout, ended together: no rank is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megakern.parallel.context import ParallelContext
from megakern.train.config import load_config
from megakern.train.launch import join
from megakern.train.processes import POLL, Ranks, can_fork
from megakern.verify.worker import run_rank

GRACE = 2.0  # seconds that the other ranks get to leave after one has failed


class LayoutError(RuntimeError):
    """A process of a layout failed; the message says which and why."""


def run_alone(folder: Path) -> None:
    """Do the job in `folder` in one process: a fork, or this one. Raises LayoutError."""
    if can_fork():  # and so that it still can for the next: the threads of a training step stay there
        return _run(folder, 1)
    try:
        run_rank(folder, ParallelContext())
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise LayoutError(f"{type(error).__name__}: {error}") from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the processes of the next layouts need the GPU's memory


def run_processes(folder: Path, count: int) -> None:
    """Do the job in `folder` in `count` new processes. Raises LayoutError that names the rank that failed first."""
    _run(folder, count)


def _run(folder: Path, count: int) -> None:
    ranks = Ranks(__name__, folder, count)
    try:
        codes = _wait(ranks)
    finally:  # also after Ctrl-C
        ranks.end()
    if any(codes):
        raise LayoutError(_first_failure(folder, codes))


def _wait(ranks: Ranks) -> list[int | None]:
    """The exit codes when all have ended, or soon after the first that is not 0; None for one that runs still."""
    end = None
    while True:
        codes = [process.poll() for process in ranks.processes]
        if None not in codes or (end is not None and time.monotonic() > end):
            return codes
        if end is None and any(codes):
            end = time.monotonic() + GRACE
        time.sleep(POLL)


def _first_failure(folder: Path, codes: list[int | None]) -> str:
    said = [json.loads(path.read_text()) for path in folder.glob("failed-*.json")]
    if said:
        _, rank, text = min(said)
        return text if len(codes) == 1 else f"rank {rank} of {len(codes)}: {text}"
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    how = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {rank} of {len(codes)} {how}"


def work(folder: Path) -> int:
    """What each process does (megakern/train/processes.py)."""
    rank = int(os.environ["RANK"])
    try:
        run_rank(folder, join(load_config(folder / "config.toml").parallel))
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - whatever it is, the launcher says which rank and why
        text = f"{type(error).__name__}: {error}"
        (folder / f"failed-{rank}.json").write_text(json.dumps([time.time(), rank, text]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
