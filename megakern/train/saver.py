"""The checkpoints of a run while it trains: written at once or beside the next steps, and what a failed one means.

    save      stage: check, plan, copy (async_save)      then a thread: write, hash, commit, over its own process group
    poll      at each step boundary: settles one that all ranks have finished
    wait      before the next save (so that saves do not pile up), and before the run ends

A checkpoint exists when it is committed, not before; a run that dies between staging and commit goes on from the one
before it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.checkpoint import CheckpointWriteError, Staged
from megakern.train.config import ParallelConfig, TrainConfig
from megakern.train.files import REAL, Files

log = logging.getLogger("megakern")


class _Writing:
    """One staged checkpoint that a thread commits."""

    def __init__(self, staged: Staged, commit: Callable[[Staged], Path]) -> None:
        self.step = staged.step
        self.path: Path | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(staged, commit), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, staged: Staged, commit: Callable[[Staged], Path]) -> None:
        try:
            self.path = commit(staged)
        except BaseException as error:  # noqa: BLE001 - the training thread raises it at its next step
            self.error = error

    def finished(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Path:
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.path


class Saver:
    """Saves to `folder` as the settings say. All ranks make one, and call its methods at the same steps.

    `saved` is the newest checkpoint that is known to be complete; `failures` counts those that were not written.
    on_failure(step, error) is called for each of these that does not end the run.
    """

    def __init__(
        self,
        folder: Path,
        parallel: ParallelContext,
        train: TrainConfig,
        limits: ParallelConfig,
        on_failure: Callable[[int, CheckpointWriteError], None],
        *,
        files: Files = REAL,
    ) -> None:
        self.folder, self.parallel, self.train, self.files = folder, parallel, train, files
        self.saved: Path | None = None
        self.failures = 0
        self._on_failure = on_failure
        self._writing: _Writing | None = None
        self._group: dist.ProcessGroup | None = None
        if train.async_save and parallel.world_size > 1:
            # Of its own: collectives of two threads in one group would meet in any order. Over the CPU: so is the data.
            self._group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=limits.timeout), group_desc="async checkpoints"
            )

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], *, last: bool = False) -> None:
        """Saves, or stages and returns while a thread writes. last: returns when it is written, and raises if not.

        Raises CheckpointError for what must not be saved, on every rank; and, with on_save_error = "stop" or for the
        last one, CheckpointWriteError for what cannot be written: this one, or the one before it.
        """
        self.wait()
        if not self.train.async_save or last:
            self._settle(
                step,
                lambda: checkpoint.save(
                    self.folder, step, tensors, state, self.parallel, keep=self.train.keep, files=self.files
                ),
                last,
            )
            return
        staged = checkpoint.stage(self.folder, step, tensors, state, self.parallel, keep=self.train.keep)
        self._writing = _Writing(
            staged, lambda staged: checkpoint.commit(staged, self.parallel, files=self.files, group=self._group)
        )

    @property
    def written(self) -> bool:
        """Has this rank written its part of what was staged? True where nothing is."""
        return self._writing is None or self._writing.finished()

    def poll(self, written: bool) -> None:
        """At a step boundary: settles a checkpoint that every rank has written. Raises as `save` does.

        written: `Saver.written` of all ranks together, as they agreed on it: else one would raise at this step, and the
        others at a later one.
        """
        if self._writing is not None and written:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises as `save` does."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._settle(writing.step, writing.result, False)

    def wait_after(self, error: Exception) -> None:
        """Like `wait`, for a run that ends with `error` on every rank: a failed checkpoint is only logged."""
        try:
            self.wait()
        except CheckpointWriteError as failed:
            log.error("%s; after that the run ended: %s", failed, error)

    def _settle(self, step: int, finish: Callable[[], Path], last: bool) -> None:
        try:
            self.saved = finish()
        except CheckpointWriteError as error:
            self.failures += 1
            if last or self.train.on_save_error == "stop":
                raise
            if self.parallel.world_rank == 0:
                log.error(
                    "CHECKPOINT NOT SAVED: %s. The run goes on, because train.on_save_error is continue; the newest "
                    "checkpoint is %s",
                    error,
                    self.saved or "none: all work so far would be lost",
                )
            self._on_failure(step, error)
