"""Commands in processes of their own, forked from a server that has imported all: 0.1 s instead of 3 s a command.

Such a process is as fresh as `python -m megakern`: nothing of the tests has run in it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from megakern.cli import main

ROOT = Path(__file__).resolve().parent.parent
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.preloaded"])


def launch(*words: object) -> subprocess.Popen:
    """The real thing, for the few tests that need it: `python -m megakern WORDS`."""
    command = [sys.executable, "-m", "megakern", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Command:
    """`function(*arguments)`, a module-level function that returns an exit code. Used like subprocess.Popen.

    Its output, and that of all processes it starts, is one text.
    """

    def __init__(self, function: Callable[..., int], *arguments: object) -> None:
        self._output, theirs = FRESH.Pipe(duplex=False)
        self._process = FRESH.Process(target=_run, args=(theirs, function, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._text = b""
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close_output(self) -> None:
        """Nobody reads it from now on."""
        self._output.close()

    def wait(self, timeout: float) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """(its output, None) when it and every process that it started have ended, which share one pipe."""
        end, ended = time.monotonic() + timeout, False
        while not ended and wait([self._output], max(0.0, end - time.monotonic())):
            part = os.read(self._output.fileno(), 1 << 16)
            self._text += part
            ended = not part
        self._process.join(max(0.0, end - time.monotonic()))
        text = self._text.decode(errors="replace")
        assert self.returncode is not None, f"it still runs after {timeout:.0f} s:\n{text}"
        assert ended, f"it has ended, but not all processes that it started:\n{text}"
        return text, None


def _run(output: multiprocessing.connection.Connection, function: Callable[..., int], arguments: tuple) -> None:
    assert "megakern.train.trainer" in sys.modules, "the server of commands has not imported tests.preloaded"
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    os.chdir(ROOT)
    sys.exit(function(*arguments))


def start(*words: object) -> Command:
    """`megakern WORDS`."""
    return Command(main, [str(word) for word in words])


def finish(process: Command | subprocess.Popen, code: int = 0, timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}, wanted {code}:\n{output}"
    return output


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_gone(pids: list[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "workers outlive their launcher"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
