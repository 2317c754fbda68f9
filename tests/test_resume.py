"""A run that is broken off and resumed is the unbroken run: weights, moments, state, losses and samples. About 10 s."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megakern as mk
from megakern.train.config import RunConfig
from megakern.train.launch import StopRequest
from megakern.train.trainer import Trainer
from tests.checkpoints import start_child
from tests.runs import MODEL, config_of, digest, digests, losses, open_trainer, train

pytestmark = pytest.mark.usefixtures("without_fsync")

VARIANTS = {
    "dropout": {},
    "accumulation": {"micro_batch": 1},
    "async save": {"async_save": True},
    "recompute": {"recompute": "full", "micro_batch": 2},
    "fp16": {"precision": "fp16"},
}


def finish(run: Path, config: RunConfig) -> Path:
    """Trains to the last step and saves, without the evaluation at the end. Returns the last checkpoint."""
    trainer = open_trainer(run, config)
    assert trainer._loop(StopRequest()) == 0
    trainer.save(last=True)
    return trainer.saved


@pytest.mark.promise("R12")
@pytest.mark.parametrize("steps, every", [(7, 3), pytest.param(21, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow if name in ("fp16", "recompute") else ()) for name in VARIANTS],
    ids=list(VARIANTS),
)
def test_resumed_at_each_step(tiny_data, tmp_path, trials, variant, steps, every):
    config = config_of(tiny_data, steps=steps, **VARIANTS[variant])
    whole = digest(finish(tmp_path / "whole", config))
    saved = digests(tmp_path / "whole")
    for step in range(1, steps, every):
        trials()
        run = tmp_path / f"from-{step}"
        name = f"step-{step:08d}"
        shutil.copytree(tmp_path / "whole" / "ckpt" / name, run / "ckpt" / name)
        for file in ("config.toml", "tokenizer.json"):
            shutil.copy(tmp_path / "whole" / file, run / file)
        assert digest(finish(run, config)) == whole, f"resumed at step {step}"
        # Not only the end: each checkpoint on the way, and each loss.
        assert digests(run).items() <= saved.items() and len(digests(run)) == steps + 1 - step
        assert losses(run).items() <= losses(tmp_path / "whole").items() and len(losses(run)) == steps - step


@pytest.mark.promise("R12")
@pytest.mark.parametrize("steps", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_stopped_by_a_signal_half_way(tiny_data, tmp_path, steps):
    """50 + 50 steps are 100 steps."""
    config = config_of(tiny_data, steps=steps, save_every=0, micro_batch=2)
    whole = digest(finish(tmp_path / "whole", config))
    trainer = open_trainer(tmp_path / "halves", config)

    class HalfWay(StopRequest):
        @property
        def number(self) -> int:
            return signal.SIGTERM if trainer.step == steps // 2 - 1 else 0  # while this step is made

        @number.setter
        def number(self, value: int) -> None:
            assert value == 0  # of the constructor

    assert trainer.fit(HalfWay()) == signal.SIGTERM and trainer.step == steps // 2
    assert digest(finish(tmp_path / "halves", config)) == whole
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == steps


@pytest.mark.promise("R12")
def test_intervals_of_logs_evaluations_and_saves_change_no_bit(tiny_data, tmp_path, trials):
    plain = digest(finish(tmp_path / "plain", config_of(tiny_data, steps=12, save_every=0)))
    for number, (log, evaluation, save) in enumerate([(1, 1, 1), (5, 3, 4), (100, 0, 7), (2, 5, 11)]):
        trials()
        settings = {"log_every": log, "eval_every": evaluation, "eval_batches": 1, "save_every": save, "keep": 2}
        assert digest(finish(tmp_path / f"{number}", config_of(tiny_data, steps=12, **settings))) == plain


# --- samples ---

LONG = replace(MODEL, sequence_length=256)  # so that an epoch has few samples


def record(trainer: Trainer, log: Path) -> None:
    """From here on each batch is written down: a line with step, index and the hash of the tokens of each sample."""
    original = trainer.batches.take

    def take(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = original(first, count)
        lines = [
            f"{trainer.step} {first + row} {hashlib.sha256(tokens[row].numpy().tobytes()).hexdigest()[:16]}\n"
            for row in range(count)
        ]
        with log.open("a") as file:
            file.write("".join(lines))
        return tokens, targets

    trainer.batches.take = take


def samples(*logs: Path) -> dict[int, Counter]:
    """Step -> its samples. A step that was made again, after a kill, must have read the same ones."""
    found: dict[int, Counter] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            step, *sample = line.split()
            found.setdefault(int(step), Counter())[" ".join(sample)] += 1
    return found


@pytest.fixture(scope="module")
def unbroken(tiny_data, tmp_path_factory) -> dict[int, Counter]:
    folder = tmp_path_factory.mktemp("unbroken")
    config = config_of(tiny_data, LONG, steps=24, save_every=0)
    trainer = open_trainer(folder / "run", config)
    assert trainer.loader.order.samples_per_epoch < 24 * 4, "no end of an epoch comes"
    record(trainer, folder / "log")
    trainer._loop(StopRequest())
    found = samples(folder / "log")
    total = sum(found.values(), Counter())
    assert len(found) == 24 and total.total() == 96 and set(total.values()) == {1}
    assert sorted(int(key.split()[0]) for key in total) == list(range(96)), "skipped or repeated"
    return found


def logged_run(run: Path, config: RunConfig, log: Path) -> None:
    trainer = open_trainer(run, config)
    record(trainer, log)
    trainer._loop(StopRequest())
    trainer.save(last=True)


@pytest.mark.promise("R13")
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("save_every", [1, 5])
def test_samples_over_kills(unbroken, tiny_data, tmp_path, trials, kills, save_every):
    """kill -9 at random times; what counts of a step that was made again is its last time."""
    config, chance = config_of(tiny_data, LONG, steps=24, save_every=save_every, keep=2), random.Random(kills)
    logs, ended = [], False
    for number in range(kills + 1):
        trials()
        logs.append(tmp_path / f"log-{number}")
        logs[-1].touch()
        pid, pipe = start_child(lambda n=number: logged_run(tmp_path / "run", config, logs[n]))
        if number < kills:
            end = time.monotonic() + 0.02 + chance.random() * 0.6
            while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
        ended = _end(pid, pipe, kill=number < kills)
        if ended:
            break
    assert ended, "the last one was not killed"
    last: dict[int, Counter] = {}
    for log in logs:
        again = samples(log)
        if again:
            killed_at = max(again)
            complete = {step: ids for step, ids in again.items() if step < killed_at or log == logs[-1]}
            assert all(unbroken[step] == ids for step, ids in complete.items()), "a step read other samples"
            last |= again
    assert last == unbroken


def _end(pid: int, pipe: int, *, kill: bool) -> bool:
    """Kills the child if asked to; True when it had come to its end."""
    try:
        if kill:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(pipe, "rb") as file:
            text = file.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ProcessLookupError, ChildProcessError):  # it has ended, and was waited for
        return True
    assert code in (0, -signal.SIGKILL), text
    return code == 0


def leg(run: Path, config: RunConfig, logs: Path) -> None:
    """Goes on with `run` to the last step of `config` on all of this world's ranks, as data-parallel ones."""
    parallel = mk.ParallelContext.create(tp=1)
    trainer = open_trainer(run, config, parallel)
    record(trainer, logs / f"{config.train.steps}-{parallel.world_rank}")
    trainer._loop(StopRequest())
    trainer.save(last=True)


@pytest.mark.promise("R13")
@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)], ids=str)
def test_samples_over_other_numbers_of_ranks(ranks, unbroken, tiny_data, tmp_path, trials, sizes):
    logs = tmp_path / "logs"
    logs.mkdir()
    for size, steps in zip(sizes, (7, 15, 24), strict=True):
        trials()
        config = config_of(tiny_data, LONG, steps=steps, save_every=0)
        ranks.run(leg, size, tmp_path / "run", config, logs)
    assert len(list(logs.iterdir())) == sum(sizes)
    assert samples(*logs.iterdir()) == unbroken


def test_train_in_one_call_is_the_same_run(tiny_data, tmp_path):
    """`finish` leaves out the evaluation at the end, and nothing else."""
    config = config_of(tiny_data, steps=3)
    assert digest(train(tmp_path / "fit", config).saved) == digest(finish(tmp_path / "loop", config))
