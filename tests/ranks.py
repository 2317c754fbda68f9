"""A pool of processes for tests that need several ranks: started once a session, given functions to run under gloo."""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
import traceback
from datetime import timedelta

from tests.commands import FRESH

WORLD = 8


def _serve(rank: int, connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        task = connection.recv()
        if task is None:
            return
        module, name, size, store, arguments = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
            )
            try:
                dist.barrier()  # else one rank may be done, and gone, while another one still connects to it
                connection.send(("ok", getattr(importlib.import_module(module), name)(*arguments)))
            finally:
                dist.destroy_process_group()
                _forget_meshes()
                gc.collect()  # models in cycles keep groups, whose threads wake up a hundred times a second
        except BaseException:  # noqa: BLE001 - whatever it is, the test process must hear of it
            connection.send(("error", traceback.format_exc()))


def _forget_meshes() -> None:
    """DTensor caches plans by meshes that compare equal, with the names of groups that are gone by the next task."""
    from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    clear_redistribute_planner_cache()
    _clear_sharding_prop_cache()


def through_gloo(group) -> None:
    """Collectives of ours over this new group go through gloo from here on, for tests that count torch's own."""
    from megakern.parallel import shared

    os.environ["MEGAKERN_SHARED_MEMORY"] = "0"
    try:
        assert str(shared.transport(group)).startswith("gloo: MEGAKERN_SHARED_MEMORY=0")
    finally:
        del os.environ["MEGAKERN_SHARED_MEMORY"]


class RankPool:
    """`run(function, size, *arguments)` -> [the result of each rank]. `function` is a module-level function."""

    def __init__(self) -> None:
        self._workers: list = []
        # Stores of all tasks stay until the end: a group that outlives its task by a reference somewhere opens its
        # store once more in its destructor, and ends the process when the file is gone.
        self._stores = tempfile.TemporaryDirectory()
        self._tasks = 0

    def _start(self, size: int) -> None:
        """Brings the pool to `size` processes; most tests need four or fewer."""
        for rank in range(len(self._workers), size):
            ours, theirs = FRESH.Pipe()
            process = FRESH.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def run(self, function, size: int, *arguments, timeout: float = 120.0) -> list:
        assert size <= WORLD, f"a pool has at most {WORLD} ranks"
        self._start(size)
        self._tasks += 1
        store = f"{self._stores.name}/{self._tasks}"
        for _, connection in self._workers[:size]:
            connection.send((function.__module__, function.__name__, size, store, arguments))
        results = []
        for rank, (process, connection) in enumerate(self._workers[:size]):
            if not connection.poll(timeout):
                self.close()
                raise AssertionError(f"rank {rank} of {size} gave no answer in {timeout:.0f} s")
            try:
                results.append(connection.recv())
            except (EOFError, ConnectionResetError):
                self.close()
                process.join(10)
                raise AssertionError(f"rank {rank} of {size} died, exit code {process.exitcode}") from None
        failures = [f"rank {rank}:\n{text}" for rank, (status, text) in enumerate(results) if status == "error"]
        if failures:
            self.close()  # a rank that failed may count its groups otherwise than the others from now on
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            connection.close()
        self._workers = []
