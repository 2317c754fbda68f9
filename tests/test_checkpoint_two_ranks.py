"""Two ranks save, and one of them dies or finds the disk full: at every file operation, and at random times.

After each the newest checkpoint loads, and is bit for bit the one before or the new one. Ranks are forked here, not
taken from the pool: they must die. The short version takes about 15 s.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # sharded tensors import it on first use: once here, and not in each forked rank
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

import megakern as mk
from megakern.train import checkpoint, checkpoint_plan
from megakern.train.checkpoint import CheckpointError, CheckpointWriteError
from megakern.train.files import REAL, Files
from tests.checkpoints import ONE, UNSYNCED, FaultyFiles, blank, same_bits, sample, start_child

OLD, NEW = 100, 200  # seeds
SHARDED = {"model.w": 0, "model.half": 0, "optimizer.exp_avg.w": 1}  # name -> dim over tp
SCENARIOS = {"new step": 2, "same step": 1}


def save_in_two(folder: Path, step: int, seed: int, parallel: mk.ParallelContext, files: Files) -> Path:
    tensors = {
        name: distribute_tensor(tensor, parallel.mesh["tp"], [Shard(SHARDED[name])], src_data_rank=None)
        if name in SHARDED
        else tensor
        for name, tensor in sample(seed).items()
    }
    return checkpoint.save(folder, step, tensors, {"seed": seed}, parallel, files=files)


def seed_at(path: Path) -> int:
    """The whole tensors, in one process. Fails unless every bit is that of one sample."""
    tensors = blank(sample(0))
    state = checkpoint.load(path, tensors, ONE)
    assert same_bits(tensors, sample(state["seed"])), f"{path} holds a mix"
    return state["seed"]


class Pair:
    """Two forked ranks, each in `work(rank, parallel)`; `ends()` is the exit code and the text of each."""

    def __init__(self, work) -> None:
        self._store = tempfile.TemporaryDirectory()
        self.pids, self._pipes = zip(*(start_child(lambda r=r: self._rank(r, work)) for r in (0, 1)), strict=True)

    def _rank(self, rank: int, work) -> str:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self._store.name}/store",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        return str(work(rank, mk.ParallelContext.create(tp=2)))

    def ends(self) -> list[tuple[int, str]]:
        results = []
        for pid, pipe in zip(self.pids, self._pipes, strict=True):
            with os.fdopen(pipe, "rb") as file:
                text = file.read().decode()
            results.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text))
        self._store.cleanup()
        return results


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before") / "ckpt"
    pair = Pair(lambda rank, parallel: save_in_two(folder, 1, OLD, parallel, UNSYNCED))
    assert [code for code, _ in pair.ends()] == [0, 0]
    assert seed_at(checkpoint.newest(folder)) == OLD
    return folder


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 60)


def operations(before: Path, folder: Path, step: int) -> list[list[str]]:
    """The file operations of each rank in a save without trouble."""

    def count(rank: int, parallel: mk.ParallelContext) -> str:
        counter = FaultyFiles(-1, "error")
        save_in_two(folder, step, NEW, parallel, counter)
        return " ".join(counter.names)

    shutil.copytree(before, folder)
    return [text.split() for code, text in Pair(count).ends()]


def found_after(folder: Path, step: int, trials) -> int:
    """The seed of the newest one, which must be sound. The save after it works, and clears what was left."""
    found = seed_at(checkpoint.newest(folder))
    assert found in (OLD, NEW)
    checkpoint.save(folder, step + 1, sample(NEW + 1), {"seed": NEW + 1}, ONE, files=UNSYNCED)
    assert seed_at(checkpoint.newest(folder)) == NEW + 1
    assert all(name == "latest" or name.removeprefix("step-").isdigit() for name in os.listdir(folder))
    trials()
    return found


@pytest.mark.promise("R2")
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_rank_dies_at_each_operation(before, tmp_path, trials, scenario, victim, every):
    step, seen = SCENARIOS[scenario], set()
    names = operations(before, tmp_path / "counted", step)[victim]
    assert len(names) > (20 if victim == 0 else 7)
    cases = [(k, kind) for k in range(len(names)) for kind in ("exit", "late-exit")]
    cases += [(k, "torn-exit") for k, name in enumerate(names) if name == "write"]
    for k, kind in cases[:: 2 * every - 1]:
        folder = shutil.copytree(before, tmp_path / f"{k}-{kind}")
        pair = Pair(
            lambda rank, parallel, f=folder, k=k, kind=kind: save_in_two(
                f, step, NEW, parallel, FaultyFiles(k, kind) if rank == victim else UNSYNCED
            )
        )
        ends = pair.ends()
        # The other hears of it in its next exchange, and there is one after each part of the work.
        assert ends[victim][0] == 9 and ends[1 - victim][0] == 1, ends
        seen.add(found_after(folder, step, trials))
    assert seen == ({OLD, NEW} if victim == 0 else {OLD})


@pytest.mark.promise("R3")
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_rank_finds_the_disk_full_at_each_operation(before, tmp_path, trials, scenario, victim, every):
    """Both ranks live on, and raise the same."""
    step = SCENARIOS[scenario]
    names = operations(before, tmp_path / "counted", step)[victim]

    def refused(folder: Path, k: int, kind: str, rank: int, parallel: mk.ParallelContext) -> str:
        try:
            save_in_two(folder, step, NEW, parallel, FaultyFiles(k, kind) if rank == victim else UNSYNCED)
        except CheckpointWriteError as error:
            assert f"rank {victim}: " in str(error) and str(folder) in str(error)
            return str(error)
        return "saved"

    cases = [(k, kind) for k in range(len(names)) for kind in ("error", "error-on")]
    cases += [(k, "torn") for k, name in enumerate(names) if name == "write"]
    for k, kind in cases[:: 2 * every - 1]:
        folder = shutil.copytree(before, tmp_path / f"{k}-{kind}")
        ends = Pair(lambda rank, parallel, f=folder, k=k, kind=kind: refused(f, k, kind, rank, parallel)).ends()
        assert [code for code, _ in ends] == [0, 0] and ends[0] == ends[1], ends
        found = found_after(folder, step, trials)
        assert found == NEW or ends[0][1] != "saved"


@pytest.mark.promise("R3")
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_real_limit_on_the_size_of_files(before, tmp_path, trials, victim, every):
    """EFBIG from the system, at each 8 bytes of the largest file of that rank."""
    operations(before, tmp_path / "counted", 2)
    largest = max(path.stat().st_size for path in (tmp_path / "counted").rglob(f"step-00000002/rank-{victim:05d}-*"))

    def refused(folder: Path, limit: int, rank: int, parallel: mk.ParallelContext) -> str:
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_in_two(folder, 2, NEW, parallel, UNSYNCED)
        except CheckpointError as error:
            return str(error)
        return "saved"

    for limit in range(0, largest, 8 * every):
        folder = shutil.copytree(before, tmp_path / f"{limit}")
        ends = Pair(lambda rank, parallel, f=folder, n=limit: refused(f, n, rank, parallel)).ends()
        assert ends[0] == ends[1] and ends[0][0] == 0, ends
        said = ends[0][1]
        assert f"rank {victim}: " in said and "File too large" in said and "MB needed" in said and "MB free" in said
        assert sorted(os.listdir(folder)) == ["latest", "step-00000001"], "something was left behind"
        assert found_after(folder, 2, trials) == OLD


@pytest.mark.promise("R2")
@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_rank_is_killed_at_random_times(tmp_path, trials, count):
    """kill -9 of one of two ranks that save without end: each step twice, into a new folder and over the old one."""
    chance, inside = random.Random(3), 0
    folder, ready = tmp_path / "ckpt", tmp_path / "ready"

    def for_ever(first: int, rank: int, parallel: mk.ParallelContext) -> None:
        for turn in range(10**6):
            save_in_two(folder, first + turn // 2, first + turn, parallel, REAL)
            if turn == 0 and rank == 0:
                ready.touch()

    for number in range(1, count + 1):
        trials()
        ready.unlink(missing_ok=True)
        pair = Pair(lambda rank, parallel, n=number: for_ever(n * 10**6, rank, parallel))
        end = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < end, "no first save"
            time.sleep(0.005)
        time.sleep(chance.random() * 0.2)
        victim = chance.randrange(2)
        os.kill(pair.pids[victim], signal.SIGKILL)
        ends = pair.ends()
        assert ends[victim][0] == -signal.SIGKILL and ends[1 - victim][0] == 1, ends
        inside += any(not (n == "latest" or n.removeprefix("step-").isdigit()) for n in os.listdir(folder))
        assert seed_at(checkpoint.newest(folder)) >= number * 10**6
    assert count < 20 or inside > 0, "no kill left anything: none came inside a save"
