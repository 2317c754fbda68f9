"""Checkpoints beside training: async saves give the bits of plain ones, wait for each other, and name what failed.

About 15 s.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time

import pytest
import torch

import megakern as mk
from megakern.train import checkpoint, checkpoint_plan
from megakern.train.checkpoint import CheckpointError, CheckpointWriteError
from megakern.train.config import ParallelConfig, TrainConfig
from megakern.train.files import REAL, Files
from megakern.train.launch import StopRequest
from megakern.train.metrics import read_metrics
from megakern.train.saver import Saver
from megakern.train.trainer import NonFiniteError
from tests.checkpoints import ONE, FaultyFiles, UnsyncedFiles, in_child, loaded_seed, sample, save_sample
from tests.runs import config_of, digest, digests, losses, open_trainer, train


class Held(UnsyncedFiles):
    """Writing waits until `go` is set. `most`: the largest number of threads that wrote at a time."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.writing = self.most = 0

    def write(self, descriptor, data):
        self.writing += 1
        self.most = max(self.most, self.writing)
        self.began.set()
        assert self.go.wait(30)
        self.writing -= 1
        return super().write(descriptor, data)


class Full(Files):
    """Takes no bytes until `room` is set."""

    def __init__(self) -> None:
        self.room = False

    def write(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)


def saver_for(folder, files: Files = REAL, on_failure=lambda step, error: None, **train) -> Saver:
    settings = TrainConfig(**{"async_save": True, **train})
    return Saver(folder, ONE, settings, ParallelConfig(), on_failure, files=files)


# --- the bits ---


@pytest.mark.promise("R16", "R12")
def test_an_async_run_saves_the_bits_of_a_plain_one(tiny_data, tmp_path, trials):
    plain, beside = tmp_path / "plain", tmp_path / "async"
    train(plain, config_of(tiny_data))
    train(beside, config_of(tiny_data, async_save=True))
    trials(6)
    assert losses(plain) == losses(beside) and len(losses(plain)) == 6
    found = digests(beside)
    assert found == digests(plain) and len(found) == 6
    # And a run that goes on from one of them ends as they do.
    for path in (beside / "ckpt").glob("step-0000000[456]"):
        shutil.rmtree(path)
    train(beside, config_of(tiny_data))
    assert digests(beside) == digests(plain)


@pytest.mark.promise("R16")
def test_training_goes_on_while_a_checkpoint_is_written(tiny_data, tmp_path):
    train(tmp_path / "plain", config_of(tiny_data, steps=5))
    trainer = open_trainer(tmp_path / "run", config_of(tiny_data, steps=5, async_save=True, save_every=0))
    trainer.saver.files = held = Held()
    for _ in range(2):
        trainer.train_step()
    trainer.save()
    assert held.began.wait(30)
    for _ in range(2):  # each changes every weight and moment in place
        trainer.train_step()
        trainer.saver.poll(trainer.outcome.written)
    assert trainer.saved is None and not list((tmp_path / "run" / "ckpt").glob("step-0000000?"))
    held.go.set()
    trainer.saver.wait()
    assert digest(trainer.saved) == digest(tmp_path / "plain" / "ckpt" / "step-00000002")
    trainer.fit(StopRequest())
    assert digest(trainer.saved) == digest(tmp_path / "plain" / "ckpt" / "step-00000005")


def test_staging_copies_what_this_rank_writes_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 300)
    tensors = sample(1) | {"model.tied": (weight := torch.randn(4, 4)), "model.tied2": weight, "model.cut": weight.t()}
    staged = checkpoint.stage(tmp_path, 1, tensors, {}, ONE)
    parts = list(staged.parts)
    assert len(parts) > 3 and list(staged.parts) == [], "a part is held after it was handed out"
    copies = [piece for part in parts for piece in part.tensors.values()]
    assert sum(piece.untyped_storage().nbytes() for piece in copies) == sum(t.nbytes for t in tensors.values())
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert not memory & {piece.untyped_storage().data_ptr() for piece in copies}


# --- one after the other ---


@pytest.mark.promise("R16")
def test_saves_do_not_pile_up(tmp_path):
    saver = saver_for(tmp_path, held := Held(), keep=5)
    saver.save(1, sample(1), {"seed": 1})
    assert held.began.wait(30)
    threading.Timer(0.3, held.go.set).start()
    started = time.monotonic()
    saver.save(2, sample(2), {"seed": 2})  # waits for the first
    assert time.monotonic() - started > 0.2 and saver.saved.name == "step-00000001"
    saver.save(3, sample(3), {"seed": 3}, last=True)
    assert saver.saved.name == "step-00000003" and held.most == 1
    assert [loaded_seed(path) for path in sorted(tmp_path.glob("step-*"))] == [1, 2, 3]


# --- failures ---


def test_a_failed_async_save_ends_the_run_at_a_step_boundary(tiny_data, tmp_path):
    trainer = open_trainer(tmp_path / "run", config_of(tiny_data, steps=500, async_save=True, save_every=2))
    trainer.saver.files = Full()
    with pytest.raises(CheckpointWriteError, match=r"saving step 2 to .* failed: .*No space left on device"):
        trainer.fit(StopRequest())
    assert 2 < trainer.step < 500 and os.listdir(tmp_path / "run" / "ckpt") == []


@pytest.mark.promise("R3")
@pytest.mark.parametrize("beside", [False, True], ids=["plain", "async"])
def test_a_run_goes_on_past_a_full_disk(tiny_data, tmp_path, caplog, trials, beside):
    """Steps 1 to 3 find no room; then there is room. The end is that of a run that never met trouble."""
    train(tmp_path / "plain", config_of(tiny_data, steps=8))
    settings = {"async_save": beside, "on_save_error": "continue", "keep": 2}
    trainer = open_trainer(tmp_path / "run", config_of(tiny_data, steps=8, **settings))
    trainer.saver.files = full = Full()
    original = trainer.train_step

    def step() -> None:
        if trainer.step == 3:
            trainer.saver.wait()
            full.room = True
        original()

    trainer.train_step = step
    trainer.fit(StopRequest())
    trials(3)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert digest(trainer.saved) == digest(tmp_path / "plain" / "ckpt" / "step-00000008")
    assert sorted(os.listdir(tmp_path / "run" / "ckpt")) == ["latest", "step-00000007", "step-00000008"]
    failed = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "save"]
    assert [(record["step"], record["failures"]) for record in failed] == [(0, 1), (1, 2), (2, 3)]
    assert all("MB needed" in record["error"] and "free" in record["error"] for record in failed)
    assert caplog.text.count("CHECKPOINT NOT SAVED") == 3
    assert "The run goes on, because train.on_save_error is continue; the newest checkpoint is none" in caplog.text


@pytest.mark.promise("R3")
@pytest.mark.parametrize("beside", [False, True], ids=["plain", "async"])
def test_a_run_goes_on_past_a_real_limit(tiny_data, tmp_path, beside):
    train(tmp_path / "plain", config_of(tiny_data, steps=4))

    def limited() -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        config = config_of(tiny_data, steps=4, async_save=beside, on_save_error="continue")
        trainer = open_trainer(tmp_path / "run", config)
        original = trainer.train_step

        def step() -> None:
            trainer.saver.wait()
            # The metrics file stays below this, a checkpoint does not.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if trainer.step == 1 else soft, hard))
            original()

        trainer.train_step = step
        trainer.fit(StopRequest())
        return " ".join(r["error"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "save")

    code, text = in_child(limited)
    assert code == 0, text
    assert text.count("File too large") == 1 and "MB needed" in text
    assert sorted(digests(tmp_path / "run")) == [f"step-0000000{step}" for step in (1, 3, 4)]
    assert digests(tmp_path / "run").items() <= digests(tmp_path / "plain").items()


@pytest.mark.parametrize("beside", [False, True], ids=["plain", "async"])
def test_the_last_checkpoint_is_never_given_up_in_silence(tiny_data, tmp_path, beside):
    settings = {"steps": 2, "save_every": 0, "async_save": beside, "on_save_error": "continue"}
    trainer = open_trainer(tmp_path / "run", config_of(tiny_data, **settings))
    trainer.saver.files = Full()
    with pytest.raises(CheckpointWriteError, match="saving step 2 to"):
        trainer.fit(StopRequest())


@pytest.mark.parametrize("beside", [False, True], ids=["plain", "async"])
def test_what_must_not_be_saved_ends_the_run_whatever_the_setting(tmp_path, beside):
    saver = saver_for(tmp_path, async_save=beside, on_save_error="continue")
    with pytest.raises(CheckpointError, match=r"NaN or infinity: model\.w") as error:
        saver.save(1, {"model.w": torch.tensor([float("nan")])}, {})
    assert not isinstance(error.value, CheckpointWriteError) and saver.failures == 0


@pytest.mark.parametrize("files, left", [(REAL, True), (Full(), False)], ids=["room", "full"])
def test_a_run_that_ends_by_an_error_of_its_own_finishes_its_checkpoint(tiny_data, tmp_path, caplog, files, left):
    config = config_of(tiny_data, steps=9, async_save=True, save_every=2, max_skipped=1)
    trainer = open_trainer(tmp_path / "run", config)
    trainer.saver.files = files
    original, poll = trainer._gradients, trainer.saver.poll

    def poisoned() -> torch.Tensor:
        loss = original()
        if trainer.step == 2:
            next(iter(trainer.model.parameters())).grad.fill_(float("nan"))
        return loss

    trainer._gradients, trainer.saver.poll = poisoned, lambda written: poll(written) if trainer.step < 2 else None
    with pytest.raises(NonFiniteError):
        trainer.fit(StopRequest())
    assert (tmp_path / "run" / "ckpt" / "step-00000002").exists() == left
    assert ("after that the run ended: step 3: the gradient was not finite" in caplog.text) != left


# --- crashes ---


def save_in_a_thread_and_die(folder, step: int, seed: int, files: Files) -> None:
    saver = saver_for(folder, files)
    tensors = sample(seed)
    saver.save(step, tensors, {"step": step, "seed": seed})
    for tensor in tensors.values():  # the next step changes what is being saved
        tensor.zero_()
    saver.wait()


@pytest.mark.promise("R2", "R16")
@pytest.mark.parametrize(
    "kind",
    ["torn-exit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("exit", "late-exit"))],
)
@pytest.mark.parametrize("step", [2, 3], ids=["same step", "new step"])
def test_dying_between_staging_and_commit(tmp_path, trials, step, kind):
    before = tmp_path / "before"
    for number in (1, 2):
        save_sample(before, number, seed=10 + number)
    save_in_a_thread_and_die(shutil.copytree(before, tmp_path / "counted"), step, 20, counter := FaultyFiles(-1, kind))
    assert loaded_seed(checkpoint.newest(tmp_path / "counted")) == 20
    seen = set()
    for k in [k for k, name in enumerate(counter.names) if kind != "torn-exit" or name == "write"]:
        trials()
        folder = shutil.copytree(before, tmp_path / f"{k}")
        code, text = in_child(lambda f=folder, k=k: save_in_a_thread_and_die(f, step, 20, FaultyFiles(k, kind)))
        assert code == 9, text
        seen.add(loaded_seed(checkpoint.newest(folder)))
    assert seen <= {12, 20} and 12 in seen


# --- several ranks ---


class FullOn(Files):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def write(self, descriptor, data):
        if torch.distributed.get_rank() == self.rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)


def beside_training(data: str, folder, name: str, beside: bool) -> dict[int, float]:
    parallel = mk.ParallelContext.create(tp=torch.distributed.get_world_size())
    config = config_of(data, steps=12, async_save=beside)
    return losses(train(folder / name, config, parallel).run)


def failing_rank(data: str, folder) -> tuple[int, str]:
    """(step at which this rank heard of it, the message)."""
    parallel = mk.ParallelContext.create(tp=torch.distributed.get_world_size())
    trainer = open_trainer(folder / "failing", config_of(data, steps=500, async_save=True, save_every=3), parallel)
    trainer.saver.files = FullOn(1)
    with pytest.raises(CheckpointWriteError) as error:
        trainer.fit(StopRequest())
    return trainer.step, str(error.value)


@pytest.mark.promise("R16")
def test_two_ranks_save_beside_their_training(ranks, tiny_data, tmp_path, trials):
    plain = ranks.run(beside_training, 2, str(tiny_data), tmp_path, "plain", False)
    beside = ranks.run(beside_training, 2, str(tiny_data), tmp_path, "async", True)
    assert plain == beside and len(plain[0]) == 12
    trials(12)
    assert digests(tmp_path / "plain") == digests(tmp_path / "async") and len(digests(tmp_path / "async")) == 12
    first, second = ranks.run(failing_rank, 2, str(tiny_data), tmp_path)
    assert first == second
    assert first[0] > 3 and "saving step 3 to" in first[1] and "failed: rank 1: [Errno 28]" in first[1]
