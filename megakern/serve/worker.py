"""The thread that runs the engine: jobs come from any thread, text goes back as it is made.

A job is one text. It is refused when too many are open; cancelled, its pages are free before the next step.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megakern.inference import Loaded, TextOf
from megakern.model.engine import Engine, Request, Step, TokenLogprob

log = logging.getLogger("megakern")


class FullError(RuntimeError):
    """As many texts as the server takes are open."""


class ClosedError(RuntimeError):
    """The worker takes no more jobs; the message says why."""


@dataclass(frozen=True)
class Delta:
    """What one step added to a text."""

    text: str
    tokens: int
    """Made so far, a stop token included."""
    finish: str | None
    """None: goes on; "stop" or "length"; or "error", and `text` says what went wrong."""
    logprob: TokenLogprob | None = None
    """Of the token of this step, where asked for; None too for a stop token."""
    prompt: tuple[TokenLogprob, ...] | None = None


class Job:
    """One text to write. `deliver` is called in the worker's thread with each `Delta`, and must not block."""

    def __init__(
        self, loaded: Loaded, request: Request, stop: tuple[str, ...], deliver: Callable[[Delta], None]
    ) -> None:
        self.request, self.deliver = request, deliver
        self.text = TextOf(loaded.tokenizer, request.stop_tokens, stop)

    def take(self, step: Step) -> Delta:
        piece = self.text.push(step)
        logprob = None if step.token in self.request.stop_tokens else step.logprob
        return Delta(piece, self.text.tokens, self.text.finish, logprob, step.prompt)


class Worker:
    """Runs `engine` until `close`. At most `max_jobs` texts are open at a time."""

    def __init__(self, engine: Engine, *, max_jobs: int) -> None:
        self.engine, self.max_jobs = engine, max_jobs
        self.failure: str | None = None
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Job] = set()
        self._closing = False
        self._keys: dict[Job, int] = {}  # of the worker's thread alone, as the engine is
        self._jobs: dict[int, Job] = {}
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="megakern-engine", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        return len(self._open)

    def submit(self, jobs: list[Job]) -> None:
        """All of them or none. Raises ConfigError for one that can never be served, FullError, ClosedError."""
        for job in jobs:
            self.engine.check(job.request)
        with self._lock:
            if self._closing or self.failure is not None:
                raise ClosedError(self.failure or "the server is shutting down")
            if len(self._open) + len(jobs) > self.max_jobs:
                raise FullError(
                    f"the server writes {len(self._open)} texts of {self.max_jobs} that it takes at a time; "
                    f"{len(jobs)} more do not fit, try again soon"
                )
            self._open.update(jobs)
            for job in jobs:
                self._inbox.put(("add", job))

    def cancel(self, jobs: list[Job]) -> None:
        """Nothing happens for those that are done."""
        for job in jobs:
            self._inbox.put(("cancel", job))

    def close(self) -> None:
        """Ends every text, and returns when the thread has ended."""
        with self._lock:
            self._closing = True
        self._inbox.put(("close", None))
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._read_inbox():
                for step in self.engine.step():
                    job = self._jobs.get(step.key)
                    if job is not None:  # else it ended by a stop string, or was cancelled, before the step's result
                        self._deliver(job, job.take(step))
        except Exception as error:  # the thread's end: whatever it is, every open text must hear of it
            log.exception("the engine has failed")
            with self._lock:
                self.failure = f"the engine has failed: {type(error).__name__}: {error}"
            self._end_all(self.failure)
        else:
            self._end_all("the server is shutting down")
        self.engine.close()

    def _read_inbox(self) -> bool:
        """Do what was asked for since the last step; waits while there is nothing to write. False: close."""
        while not (self._inbox.empty() and self.engine.busy):
            what, job = self._inbox.get()
            if what == "close":
                return False
            if what == "add":
                key = self.engine.add(job.request)
                self._keys[job], self._jobs[key] = key, job
            elif job in self._keys:
                self._forget(job)
        return True

    def _deliver(self, job: Job, delta: Delta) -> None:
        if delta.finish is not None:
            self._forget(job)  # before the answer is out: then its pages are free
        job.deliver(delta)

    def _forget(self, job: Job) -> None:
        key = self._keys.pop(job)
        del self._jobs[key]
        self.engine.cancel(key)
        with self._lock:
            self._open.discard(job)

    def _end_all(self, reason: str) -> None:
        with self._lock:
            jobs, self._open = list(self._open), set()
        for job in jobs:
            job.deliver(Delta(reason, job.text.tokens, "error"))
