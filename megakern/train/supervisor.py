"""`megakern train` over its workers: starts them, passes signals on, and starts again from the last good checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megakern.train import watch
from megakern.train.checkpoint_load import by_age
from megakern.train.launch import BAD_SETTINGS, FORWARDED, GAVE_UP, LOST, NO_READER, NON_FINITE
from megakern.train.processes import Ranks

WORKER = "megakern.train.worker"
GRACE = 15.0  # seconds that other workers get to leave after the first has ended a stop
POLL = 0.05  # seconds


@dataclass(frozen=True)
class End:
    """How the workers of one try ended. `again`: fresh processes may do better."""

    code: int
    why: str = ""
    again: bool = False


class Supervisor:
    """Trains the run at `run` in `nproc` processes of this machine, each of which does <worker>.work(RUN).

    After a crash or a hang all processes are ended, and fresh ones go on from the newest sound checkpoint. It gives up
    after `restarts` restarts in a row that brought no newer checkpoint. Not tried again: wrong settings or data, a
    failed checkpoint, too many non-finite gradients, and a stop that the user asked for.
    """

    def __init__(
        self, run: Path, nproc: int, *, restarts: int = 3, worker: str = WORKER, fork: bool | None = None
    ) -> None:
        self.run, self.nproc, self.restarts, self.worker, self.fork = run, nproc, restarts, worker, fork
        self.received: list[int] = []
        self._ranks: Ranks | None = None

    def train(self) -> int:
        """Returns the exit code for this process; see megakern/train/launch.py."""
        before = {number: signal.signal(number, self._receive) for number in FORWARDED}
        try:
            return self._tries()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tries(self) -> int:
        tries, newest = 0, newest_step(self.run)
        while True:
            end = self._try()
            if not end.again or self.received or self.restarts == 0:
                return end.code
            reached = newest_step(self.run)
            tries, newest = (1, reached) if reached > newest else (tries + 1, newest)
            if tries > self.restarts:
                _say(f"given up: {self.restarts} restarts in a row brought no newer checkpoint; last: {end.why}")
                return GAVE_UP
            start = f"the checkpoint of step {reached}" if reached >= 0 else "the beginning: there is no checkpoint yet"
            _say(f"fresh processes go on from {start} (restart {tries} of {self.restarts} without a newer one)")

    def _receive(self, number: int, _frame) -> None:
        self.received.append(number)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process in self._ranks.processes if self._ranks else ():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _try(self) -> End:
        for rank in range(self.nproc):  # nothing of an earlier try is taken for this one's
            watch.trace_file(self.run, rank).unlink(missing_ok=True)
            watch.stacks_file(self.run, rank).unlink(missing_ok=True)
        self._ranks = Ranks(self.worker, self.run, self.nproc, fork=self.fork)
        for number in self.received:  # came while there was nobody to pass it to
            self._pass_on(number)
        try:
            return self._wait()
        finally:
            self._ranks.end(GRACE)
            self._ranks = None

    def _wait(self) -> End:
        processes, first_end = self._ranks.processes, None
        orderly = {0, *(128 + number for number in FORWARDED)}
        while True:
            codes = [process.poll() for process in processes]
            ended = [code for code in codes if code is not None]
            if any(code not in orderly for code in ended):
                return self._failure(processes)
            if len(ended) == len(processes):
                return End(max(ended))
            if len(self.received) > 1:
                return End(128 + self.received[-1])
            if ended and first_end is None:
                first_end = time.monotonic()
            if first_end is not None and time.monotonic() - first_end > GRACE:
                _say(f"workers still ran {GRACE:.0f} s after the first had ended; they were ended")
                return End(max(ended) or LOST, "workers did not end", again=max(ended) == 0)
            time.sleep(POLL)

    def _failure(self, processes: list) -> End:
        """Some worker has failed: give the others a moment to meet the consequences, look at all, and report."""
        end = time.monotonic() + watch.SETTLE
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(POLL)
        watch.ask_for_stacks(self.run, self.nproc)
        codes = [process.poll() for process in processes]
        if NO_READER in codes:  # the others have met the consequences
            return End(NO_READER)
        report = watch.Report.of(self.run, self.nproc, codes)
        said = [code for code in codes if code in (BAD_SETTINGS, NON_FINITE)]
        if said and not any(rank.failure for rank in report.ranks):
            return End(said[0])  # before the ranks had records: the worker has said it
        if self.received and all(code == -self.received[0] for code in codes if code):
            return End(128 + self.received[0])  # the signal came before the workers listened
        report.tell()
        if report.own:
            return End(next(rank.code for rank in report.ranks if rank.failure in watch.OWN) or LOST)
        died = [code for code in codes if code is not None and code < 0 and code != -signal.SIGABRT]
        return End(128 - died[0] if died else LOST, report.why, again=True)  # a shell would show 128 + n


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of RUN whose manifest can be read; -1 when there is none."""
    steps = [manifest.step for _, manifest, _ in by_age(run / "ckpt") if manifest is not None]
    return max(steps, default=-1)


def _say(text: str) -> None:
    print(f"megakern: {text}", file=sys.stderr, flush=True)
