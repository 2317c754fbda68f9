"""The processes of one run on this machine: forked where that is safe, fresh interpreters elsewhere.

A forked process has imported everything already and shares that memory. Measured on a CPU: 0.1 s of processor time to
start a rank instead of 2.7 s, which is most of the time of a restart.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megakern.train import machine
from megakern.train.launch import FORWARDED

POLL = 0.02  # seconds
PATIENCE = 15.0  # seconds for a process to be gone after SIGKILL, or after its last word


def can_fork() -> bool:
    """May a child go on with what this process has imported?

    Not beside a GPU: CUDA does not survive a fork. Not beside a second thread: its locks would be copied as they are,
    and OpenMP's pool without its threads, for which the child would wait for ever. numpy's OpenBLAS ends its threads
    before a fork and starts them again on demand, so threads are counted after one.
    """
    if sys.platform != "linux" or machine.device_type() != "cpu":
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task")) == 1


class Forked:
    """A child that does `work` and ends with the exit code which that returns. Used like subprocess.Popen."""

    def __init__(self, work: Callable[[], int], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # no handler of ours runs in the child
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, environment, blocked)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _be_child(work: Callable[[], int], environment: dict[str, str], blocked: set[signal.Signals]) -> None:
    """Never returns. Leaves without what the parent does at its own end."""
    code = 1
    try:
        os.setsid()
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.environ.update(environment)
        code = work()
    except BaseException:  # noqa: BLE001 - there is no caller to raise to
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):  # whoever reads them may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def apart(work: Callable[[], Any]) -> Any:
    """What `work` returns, through JSON. Done in a child if this process can fork: the threads it needs stay there."""
    if not can_fork():
        return work()
    out, into = os.pipe()

    def child() -> int:
        with os.fdopen(into, "w") as pipe:
            json.dump(work(), pipe)
        return 0

    process = Forked(child, {})
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    if process.wait(timeout=PATIENCE) != 0:
        raise RuntimeError(f"a process that this one started for a part of its work ended with {process.returncode}")
    return json.loads(text)


class Ranks:
    """`count` processes that each do `module`.work(FOLDER), which joins the others (launch.join), and return its code.

    module: what `python -m <module> FOLDER` runs too. Each process leads a session of its own.
    """

    def __init__(self, module: str, folder: Path, count: int, *, fork: bool | None = None) -> None:
        """fork: None, or what the caller knows better than `can_fork`."""
        fork = can_fork() if fork is None else fork
        listener = socket.create_server(("127.0.0.1", 0), backlog=count)  # there first, so no port to race for
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks join this process's store
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, machine.cores() // count))),
            "MEGAKERN_PARENT": str(os.getpid()),
        }
        start = partial(_start_forked, module, folder, listener) if fork else partial(_start_fresh, module, folder)
        self.processes: list[Forked | subprocess.Popen] = []
        try:
            for rank in range(count):
                self.processes.append(start({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            # After the forks: it has a thread.
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        except BaseException:
            self.end()
            raise

    def end(self, patience: float = PATIENCE) -> None:
        """SIGKILL, which ends stopped processes too; each leads a session, so what it started ends with it."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nothing ends it
                process.wait(timeout=patience)
        self._store = None


def _start_forked(module: str, folder: Path, listener: socket.socket, environment: dict[str, str]) -> Forked:
    work = importlib.import_module(module).work
    gc.freeze()  # the collector of a child need not touch, and so copy, what is here

    def child() -> int:
        listener.close()
        return work(folder)

    return Forked(child, environment)


def _start_fresh(module: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", module, str(folder)]
    return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
