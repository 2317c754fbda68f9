"""How a process joins the others of a run, those of `megakern train`, torchrun or Slurm, and how it is asked to stop.

exit code   meaning
0           the run is complete
1           an error, or a lost or hanging process; the message says which rank, where and why
2           wrong settings, data or options; nothing was started
3           too many steps in a row with a non-finite gradient
4           given up: restarts in a row brought no newer checkpoint
141         the reader of the output has gone
128 + n     stopped by signal n after saving a checkpoint (130: Ctrl-C, 143: SIGTERM); at once after a second signal;
            with --restarts 0 also: a process was killed by signal n, nothing was saved
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from megakern.config import require
from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from megakern.parallel.overlap import why_not_fused
from megakern.train import machine
from megakern.train.config import ParallelConfig

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
START_TIMEOUT = 120.0  # seconds, at least, that ranks wait for each other to start
LOST, BAD_SETTINGS, NON_FINITE, GAVE_UP, NO_READER = 1, 2, 3, 4, 141  # exit codes


def joined_world() -> dict[str, str] | None:
    """The RANK, WORLD_SIZE ... variables when torchrun or srun started this process among others, else None."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {"LOCAL_RANK": env.get("LOCAL_RANK", "0"), "RANK": env["RANK"], "WORLD_SIZE": env["WORLD_SIZE"]}
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_NTASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": env.get("SLURM_NTASKS_PER_NODE", "1"),
            "MASTER_ADDR": env.get("MASTER_ADDR", first_host(env["SLURM_JOB_NODELIST"])),
            "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000)),
        }
    return None


def default_processes(settings: ParallelConfig) -> int:
    """tp x dp; without dp, as many groups of tp as there are GPUs for, and at least one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return settings.tp * (settings.dp or max(1, gpus // settings.tp))


def first_host(nodelist: str) -> str:
    """Slurm's "node[07-09,12],other" -> "node07"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodelist)
    require(match is not None, f"SLURM_JOB_NODELIST = {nodelist!r} names no host")
    return match.group(1) + (match.group(2) or "")


def join(settings: ParallelConfig) -> ParallelContext:
    """Join the world that the environment describes (or be alone), set this process's device and threads.

    `settings.timeout` bounds every collective after the first. Raises ConfigError when the layout is not one of this
    many processes.
    """
    machine.keep_freed_memory()
    _die_with_parent()
    world = joined_world()
    device = machine.device_type()
    if world is None:
        settings.over(1)
        return ParallelContext()
    os.environ.update(world)
    size, local = int(world["WORLD_SIZE"]), int(world["LOCAL_RANK"])
    settings = settings.over(size)
    if device == "cuda":
        count = torch.cuda.device_count()
        require(local < count, f"local rank {local} has no GPU of its own: this machine has {count}; start fewer")
        torch.cuda.set_device(local)
    else:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, machine.cores() // local_size))))
    if size == 1:
        return ParallelContext()
    if settings.fused_collectives and settings.tp > 1:
        reason = why_not_fused(device, settings.tp)
        require(reason is None, f"parallel.fused_collectives was asked for, but {reason}")
    # Ranks do not start at the same moment: imports and slow disks are waited for longer than a collective is.
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=max(settings.timeout, START_TIMEOUT))
    )
    trace.collective("barrier", None, None)
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=settings.timeout), dist.group.WORLD)
    return ParallelContext.create(
        tp=settings.tp,
        dp=settings.dp,
        replicas=settings.replicas,
        device_type=device,
        sequence_parallel=settings.sequence_parallel,
        overlap_rows=settings.overlap_rows,
        fused_collectives=settings.fused_collectives,
    )


def _die_with_parent() -> None:
    """A worker whose launcher is gone (kill -9) ends too, instead of holding cores and the run's lock for ever."""
    parent = os.environ.get("MEGAKERN_PARENT")
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR1; a second signal leaves at once with 128 + n."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        for number in FORWARDED:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
