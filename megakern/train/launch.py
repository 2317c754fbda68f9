"""How processes start and end: our own workers through torch's launcher, or joining those of torchrun or Slurm.

exit code   meaning
0           the run is complete
1           an error; the message says what and where
2           wrong settings, data or options; nothing was started
3           too many steps in a row with a non-finite gradient
128 + n     stopped by signal n after saving a checkpoint (130: Ctrl-C, 143: SIGTERM)
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
from pathlib import Path

import torch
import torch.distributed as dist

from megakern.config import require
from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from megakern.parallel.overlap import why_not_fused
from megakern.train import machine
from megakern.train.config import ParallelConfig

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 15.0  # seconds that other workers get to leave after the first has ended a stop


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


def start_workers(run: Path, nproc: int) -> int:
    """Run `python -m megakern.train.worker RUN` in `nproc` processes until they end; returns the exit code for this
    one.

    Signals are passed on. When a worker fails, the others are ended at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, machine.cores() // nproc)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # workers join this process's store: no port to race for
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "MEGAKERN_PARENT": str(os.getpid()),
    }
    context = start_processes(
        name="megakern",
        entrypoint=sys.executable,
        args={rank: ("-m", "megakern.train.worker", str(run)) for rank in range(nproc)},
        envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    received: list[int] = []

    def forward(number: int, _frame) -> None:
        received.append(number)
        for pid in context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # that worker has ended already

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return _wait(context, received)
    finally:
        context.close(signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(context, received: list[int]) -> int:
    processes = [handler.proc for _, handler in sorted(context.subprocess_handlers.items())]
    first_end = None
    while True:
        codes = [process.poll() for process in processes]
        ended = [code for code in codes if code is not None]
        stopped = {128 + number for number in received}
        failures = [code for code in ended if code != 0 and code not in stopped]
        if failures:
            # A process killed by a signal has a negative code; a shell would show 128 + n.
            rank = codes.index(failures[0])
            if failures[0] < 0:
                name = signal.Signals(-failures[0]).name
                print(f"megakern: worker {rank} was ended by {name}; the other workers are stopped", file=sys.stderr)
                return 128 - failures[0]
            return failures[0]
        if len(ended) == len(processes):
            return max(ended)
        if ended and first_end is None:
            first_end = time.monotonic()
        if first_end is not None and time.monotonic() - first_end > GRACE:
            print(f"megakern: workers still run {GRACE:.0f} s after the first ended; they are stopped", file=sys.stderr)
            return 1
        time.sleep(0.05)


def join(settings: ParallelConfig) -> ParallelContext:
    """Join the world that the environment describes (or be alone), set this process's device and threads.

    `settings.timeout` bounds every collective. Raises ConfigError when the layout is not one of this many processes.
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
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=settings.timeout))
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


class DivergedError(RuntimeError):
    """The ranks of a run no longer do the same."""


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

    def agreed(self, parallel: ParallelContext) -> int:
        """The signal number that any rank has received, the same on all ranks; 0 for none.

        The same small all-reduce compares what collectives each rank has made in this step. gloo answers another shape
        on one rank with an abort, a time-out, or silently with garbage: this check stands before each save, so that
        no garbage is saved. Raises DivergedError on every rank.
        """
        if parallel.mesh is None:
            return self.number
        trace.phase("agreement at the end of the step")
        digest = trace.digest()
        flags = torch.tensor([self.number, digest, -digest], dtype=torch.int64, device=parallel.device())
        trace.collective("all_reduce", flags, None)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        number, highest, minus_lowest = flags.tolist()
        if highest != -minus_lowest:
            raise DivergedError(
                "the ranks have not made the same collectives in this step, so their sums may be garbage; nothing of "
                "this step is saved, go on from the newest checkpoint"
            )
        return number
