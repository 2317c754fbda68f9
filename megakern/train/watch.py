"""What happened when a rank fails: which one, why, at which step and operation; one message, and one file of all ranks.

RUN/ranks/rank-00000.trace   where the rank is (megakern/parallel/trace.py); readable when it is dead or stopped
RUN/ranks/rank-00000.txt     its Python stacks: of its own error, and those asked for by SIGUSR2
RUN/failure-<time>.txt       the report of a failure: a table of all ranks, their last collectives, their stacks

`megakern train` reports for its workers. Under torchrun and Slurm the first rank that finds out does, once for all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.trace import Collective, Place

SETTLE = 0.3  # seconds that the other ranks get to meet the consequences and to write their stacks
SHOWN = 8  # ranks that the message names one by one; the file has all
OWN = ("settings", "checkpoint", "non-finite")  # failures whose message is all there is to say
_stacks: TextIO | None = None


def folder_of(run: Path) -> Path:
    return run / "ranks"


def trace_file(run: Path, rank: int) -> Path:
    return folder_of(run) / f"rank-{rank:05d}.trace"


def stacks_file(run: Path, rank: int) -> Path:
    return folder_of(run) / f"rank-{rank:05d}.txt"


# --- in a rank ---


def begin(run: Path, rank: int, world: int) -> None:
    """This process records where it is, and writes its stacks when it crashes or is sent SIGUSR2. Raises OSError."""
    global _stacks
    folder_of(run).mkdir(exist_ok=True)
    if rank == 0:
        (folder_of(run) / "reported").unlink(missing_ok=True)
    trace.start(trace_file(run, rank), rank, world)
    _stacks = stacks_file(run, rank).open("w")
    faulthandler.enable(_stacks)
    faulthandler.register(signal.SIGUSR2, _stacks, all_threads=True)


def failed(run: Path, kind: str, error: BaseException) -> bool:
    """Record what ends this rank. False when it did not record yet: then nobody else will say it.

    kind: one of OWN, "error", "collective" (the consequence of another rank's failure), "diverged".
    """
    lines = traceback.format_exception(error)
    if _stacks is not None and kind not in OWN:
        _stacks.write("".join(lines))
        _stacks.flush()
    return trace.fail(kind, str(error) if kind in OWN else f"{type(error).__name__}: {error}")


def kind_of(error: BaseException) -> str:
    """ "collective" for an error of torch.distributed itself: another rank has failed, or does something else."""
    if isinstance(error, dist.DistError):
        return "collective"
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "/torch/distributed/" in frames[-1].filename
    return "collective" if type(error) is RuntimeError and (inside or "/gloo/" in str(error)) else "error"


def report_once(run: Path, world: int) -> None:
    """Of all ranks that call it, one prints the report; it also ends the ranks of this machine that are stopped."""
    time.sleep(SETTLE)
    try:
        os.close(os.open(folder_of(run) / "reported", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    ask_for_stacks(run, world)
    report = Report.of(run, world)
    report.tell()
    for rank in report.ranks:
        if rank.state == "T":  # a launcher would wait for it: SIGTERM does nothing to a stopped process
            os.kill(rank.place.pid, signal.SIGKILL)


# --- looking at all ranks ---


def ask_for_stacks(run: Path, world: int) -> None:
    """The living ranks of this machine write their Python stacks; those that are stopped cannot."""
    sizes = {}
    for rank in range(world):
        place = trace.read(trace_file(run, rank))
        if place is None or place.pid == os.getpid() or not _is_here(place) or place.failure is not None:
            continue
        if trace.process_state(place.pid) not in ("R", "S", "D"):
            continue
        path = stacks_file(run, rank)
        with contextlib.suppress(OSError):
            sizes[path] = path.stat().st_size
            os.kill(place.pid, signal.SIGUSR2)
    end = time.monotonic() + SETTLE
    while time.monotonic() < end and any(path.stat().st_size == size for path, size in sizes.items()):
        time.sleep(0.02)


def _is_here(place: Place) -> bool:
    """Is the process of this record one of this machine that has not ended (and not a later one of its id)?"""
    return place.host == platform.node() and trace.started_ticks(place.pid) == place.ticks


@dataclass(frozen=True)
class Rank:
    """One rank as it was found. `state`: letter of /proc, None when gone; `code`: exit code if the caller knows it."""

    number: int
    place: Place | None
    here: bool
    state: str | None
    code: int | None

    @property
    def failure(self) -> str | None:
        return self.place.failure["kind"] if self.place and self.place.failure else None

    def what(self) -> str:
        """What it does, or how it ended, in words."""
        if self.place is not None and self.place.failure is not None:
            verb = "stopped: " if self.failure in OWN else "failed: " if self.failure == "diverged" else "raised "
            return verb + self.place.failure["text"].partition(" This is typically caused")[0]  # gloo guesses
        if self.state == "T":
            return "is stopped (SIGSTOP, or a debugger)"
        if self.code is not None and self.code < 0:
            name = signal.Signals(-self.code).name
            return f"died by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
        if self.code is not None:
            return f"ended with exit code {self.code}"
        if self.place is None:
            return "has not joined"
        if not self.here:
            return f"runs on {self.place.host}, or has died there without a word"
        return "runs" if self.state else "died without a word (killed, or a crash outside of Python)"

    def where(self) -> str:
        """Its step, phase and last collective."""
        if self.place is None:
            return "before its first step"
        step = "before its first step" if self.place.step < 0 else f"at step {self.place.step}"
        last = f"; last collective: {self.place.last}" if self.place.last else ""
        return f"{step}, in {self.place.phase or 'start'}{last}"


@dataclass(frozen=True)
class Report:
    """What is known of a failure. `why`: a sentence that names rank, step and operation. `own`: it is one of OWN."""

    run: Path
    ranks: list[Rank]
    why: str
    own: bool

    @classmethod
    def of(cls, run: Path, world: int, codes: list[int | None] | None = None) -> Report:
        """Read the records of RUN. `codes`: exit codes of the processes as far as they have ended, if known."""
        ranks = []
        for number in range(world):
            place = trace.read(trace_file(run, number))
            here = place is not None and place.host == platform.node()
            state = trace.process_state(place.pid) if here and _is_here(place) else None
            code = codes[number] if codes else None
            ranks.append(Rank(number, place, here, None if state == "Z" else state, code))
        own = [rank for rank in ranks if rank.failure in OWN]
        if own:
            return cls(run, ranks, _own_words(own, world), True)
        return cls(run, ranks, _why(ranks), False)

    def tell(self, stream: TextIO | None = None) -> None:
        """Write RUN/failure-<time>.txt and print the message. A failure of the user's own needs only its message."""
        stream = stream or sys.stderr
        lines = [self.why]
        if not self.own:
            others = [r for r in self.ranks if f"rank {r.number} " not in self.why]
            lines += [f"  rank {r.number} {r.what()}, {r.where()}" for r in others[:SHOWN]]
            if len(others) > SHOWN:
                lines.append(f"  and {len(others) - SHOWN} more ranks")
            try:
                lines.append(f"  where every rank was, with its Python stack: {self._write()}")
            except OSError as error:
                lines.append(f"  the report could not be written: {error}")
        print("megakern: " + "\n".join(lines), file=stream, flush=True)

    def _write(self) -> Path:
        path = self.run / f"failure-{datetime.now():%Y%m%d-%H%M%S-%f}.txt"
        lines = [self.why, ""]
        for rank in self.ranks:
            place = rank.place
            who = f"process {place.pid} on {place.host}" if place else "no record"
            lines += [f"rank {rank.number} ({who}) {rank.what()}", f"  {rank.where()}"]
        for rank in self.ranks:
            calls = rank.place.collectives[-20:] if rank.place else []
            lines += ["", f"rank {rank.number}: its last collectives, oldest first"]
            lines += [f"  {datetime.fromtimestamp(c.time):%H:%M:%S.%f}  {c}" for c in calls] or ["  none"]
            with contextlib.suppress(OSError):
                stacks = stacks_file(self.run, rank.number).read_text(errors="replace").strip()
                lines += [f"rank {rank.number}: Python stack", *(f"  {line}" for line in stacks.splitlines())]
        path.write_text("\n".join(lines) + "\n")
        return path


def _own_words(ranks: list[Rank], world: int) -> str:
    texts: dict[str, list[int]] = {}
    for rank in ranks:
        texts.setdefault(rank.place.failure["text"], []).append(rank.number)
    return "\n".join(
        text if len(numbers) == world else f"rank {', '.join(map(str, numbers))}: {text}"
        for text, numbers in texts.items()
    )


def _why(ranks: list[Rank]) -> str:
    """The likeliest cause: the rank that failed by itself, before those that suffered from it."""
    raised = [r for r in ranks if r.failure == "error"]
    if raised:
        first = min(raised, key=lambda r: r.place.failure["time"])
        return f"rank {first.number} {first.what()}, {first.where()}"
    other = divergence({r.number: r.place.collectives for r in ranks if r.place})
    if other:
        return other
    # An abort can be a consequence: NCCL's watchdog and gloo end a process so when another rank is gone or differs.
    aborted = -signal.SIGABRT
    quiet = [r for r in ranks if r.failure is None]
    for these in (
        [r for r in quiet if r.code is not None and r.code < 0 and r.code != aborted],
        [r for r in quiet if r.state == "T"],
        [r for r in quiet if r.place is not None and r.here and r.state is None and r.code is None],
        [r for r in quiet if r.code is not None and r.code < 0],
        [r for r in quiet if r.code],
        [r for r in quiet if r.place is None],
    ):
        if these:
            said = "; ".join(f"rank {r.number} {r.what()}, {r.where()}" for r in these[:SHOWN])
            return said + (_elsewhere(these[0], ranks) if these[0].code == aborted else "")
    return _behind(ranks)


def _elsewhere(rank: Rank, ranks: list[Rank]) -> str:
    """Ranks in another step than one that aborted: a collective was skipped, and none is left that both have made."""
    steps = {r.number: r.place.step for r in ranks if r.place}
    other = [r for r in ranks if r.number in steps and steps[r.number] != steps.get(rank.number, -1)]
    return f"; rank {other[0].number} was {other[0].where()}: the ranks no longer do the same" if other else ""


def divergence(calls: dict[int, list[Collective]]) -> str | None:
    """In words, the first collective at which ranks differ; None when all that is known agrees.

    A collective is known by its step and its number within the step: there all ranks must do the same.
    """
    by_place: dict[tuple[int, int], dict[int, Collective]] = {}
    for rank, made in calls.items():
        for call in made:
            by_place.setdefault((call.step, call.index), {})[rank] = call
    for _, made in sorted(by_place.items()):
        texts: dict[str, list[int]] = {}
        for rank, call in made.items():
            texts.setdefault(call.text, []).append(rank)
        if len(texts) == 1:
            continue
        few, *_, many = sorted(texts.items(), key=lambda item: (len(item[1]), -item[1][0]))
        call = made[few[1][0]]
        return (
            f"rank {_numbers(few[1])} called {call}; rank {_numbers(many[1])} called {many[0]} there: "
            "the ranks no longer do the same"
        )
    return None


def _numbers(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")


def _behind(ranks: list[Rank]) -> str:
    """No rank has failed by itself: who has not come to the collective in which the others wait."""
    reached = {r.number: (r.place.last.step, r.place.last.index) for r in ranks if r.place and r.place.last}
    if not reached:
        return f"rank 0 {ranks[0].what()}, {ranks[0].where()}"
    furthest = max(reached, key=reached.get)
    behind = [r for r in ranks if reached.get(r.number, (-2, 0)) < reached[furthest]]
    if not behind:
        first = next((r for r in ranks if r.failure), ranks[0])
        return f"rank {first.number} {first.what()}, {first.where()}"
    waited = ranks[furthest].place.last
    names = "; ".join(f"rank {r.number} is behind, {r.where()}" for r in behind[:SHOWN])
    return f"{names}; rank {furthest} waited in {waited}"
