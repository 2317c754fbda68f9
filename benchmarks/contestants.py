"""Contestants that need a process of their own: memory settings are process-wide, and a failure ends nobody else.

A contestant is an object in a process, made there by `make(name, setting)`; `call` runs one of its methods. Processes
with all cores take turns, so that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import traceback
from collections.abc import Callable
from typing import Any


class NotHereError(Exception):
    """The contestant's library is not installed, or does not run on this machine; the message says which."""


class FailedError(Exception):
    """What a contestant raised, as text."""


class Contestant:
    """`make(name, setting)` in a process. Raises NotHereError or FailedError at the first `call`."""

    def __init__(self, make: Callable[[str, Any], Any], name: str, setting: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, name, setting), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise FailedError(f"its process died with code {self._process.exitcode}") from None
        if kind == "not here":
            raise NotHereError(value)
        if kind == "failed":
            raise FailedError(value)
        return value

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve(pipe, make, name: str, setting) -> None:
    made, reason = None, None
    try:
        made = make(name, setting)
    except NotHereError as error:
        reason = ("not here", str(error))
    except Exception as error:  # noqa: BLE001 - the parent hears of it at its first call
        reason = _told(error)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = reason or ("done", getattr(made, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - the same
            answer = _told(error)
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            return


def _told(error: Exception) -> tuple[str, str]:
    traceback.print_exc(file=sys.stderr)
    first = (str(error).strip().splitlines() or [""])[0]
    return "failed", f"{type(error).__name__}: {first[:200]}"


def ratio_to(first: list[float], own: list[float]) -> float:
    """How many times as fast: the median over the turns, which stand side by side in time."""
    return statistics.median(a / b for a, b in zip(first, own, strict=True))


def goal(rows: list[dict], what: str, ours: str, peers: tuple[str, ...], wanted: float, rate: str) -> dict | None:
    """How far `ours` is ahead of the fastest of `peers` by the figure `rate`; None when one side was not timed."""
    found = {row["contestant"]: row[rate] for row in rows if rate in row}
    rivals = [name for name in peers if name in found]
    if ours not in found or not rivals:
        return None
    best = max(rivals, key=found.get)
    return {"what": what, "wanted": wanted, "reached": found[ours] / found[best], "against": best}
