"""Fresh processes for one layout, by torch's own launcher, ended together: no rank is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from megakern.parallel.context import ParallelContext
from megakern.train import machine
from megakern.train.config import load_config
from megakern.train.launch import join
from megakern.verify.worker import run_rank

GRACE = 2.0  # seconds that the other ranks get to leave after one has failed


class LayoutError(RuntimeError):
    """A process of a layout failed; the message says which and why."""


def run_alone(folder: Path) -> None:
    """Do the job in `folder` in this process. Raises LayoutError."""
    try:
        run_rank(folder, ParallelContext())
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise LayoutError(f"{type(error).__name__}: {error}") from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the processes of the next layouts need the GPU's memory


def run_processes(folder: Path, count: int) -> None:
    """Do the job in `folder` in `count` new processes. Raises LayoutError that names the rank that failed first."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = start_processes(
        _work, (folder, count, store.port, os.getpid()), nprocs=count, join=False, daemon=True, start_method="spawn"
    )
    try:
        while not context.join(grace_period=GRACE):
            pass
    except ProcessException as error:
        text = error.msg.strip().splitlines()[-1]
        raise LayoutError(f"rank {error.error_index} of {count}: {text}") from error
    finally:  # also after Ctrl-C
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _work(rank: int, folder: Path, count: int, port: int, parent: int) -> None:
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks join the parent's store: no port to race for
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MEGAKERN_PARENT": str(parent),
        }
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // count)))
    run_rank(folder, join(load_config(folder / "config.toml").parallel))
    dist.destroy_process_group()
