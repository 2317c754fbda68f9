"""What is said of work that takes long: a bar on a terminal, and when piped a line now and then. Both on stderr."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 15.0
"""Seconds between two lines when piped: a log says that it goes on, and is not flooded."""


def duration(seconds: float) -> str:
    """3723 -> "1:02:03"."""
    minutes, second = divmod(int(max(0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """`with Progress(total, "reading") as progress: progress.update(amount)`. What is over before EVERY says nothing
    when piped. `total` 0: not known. shown: False says nothing at all."""

    def __init__(self, total: int, what: str, *, unit: str = "B", shown: bool = True) -> None:
        self._total, self._what, self._shown, self._done = total, what, shown, 0
        self._stream, self._start = sys.stderr, time.monotonic()
        self._next = self._start + EVERY
        self._bar = None
        if shown and self._stream.isatty():
            self._bar = tqdm(total=total or None, desc=what, unit=unit, unit_scale=True, file=self._stream, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._shown and time.monotonic() >= self._next:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        self._next = now + EVERY
        gone, share = now - self._start, min(1.0, self._done / self._total) if self._total else 0.0
        left = f"{share:.0%}, {duration(gone / share - gone)} left" if share else f"{duration(gone)} so far"
        self._stream.write(f"{self._what}: {left}\n")
        self._stream.flush()


class Meanwhile:
    """Steps without a number, by name: on a terminal the next takes the place of the one before, and the end of all;
    when piped, the first and then one every EVERY seconds."""

    def __init__(self) -> None:
        self._stream, self._next = sys.stderr, 0.0
        self._live = self._stream.isatty()

    def __enter__(self) -> Meanwhile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def say(self, text: str) -> None:
        now = time.monotonic()
        if not self._live and now < self._next:
            return
        self._next = now + EVERY
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._stream.flush()
