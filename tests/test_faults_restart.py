"""A run that is killed, hangs or is asked to stop: restarted or resumed, it ends with the bits of the unbroken one."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from megakern.train import supervisor
from megakern.train.checkpoint import newest, verify
from megakern.train.manifest import read_manifest
from megakern.train.metrics import read_metrics
from megakern.train.supervisor import End, Supervisor, newest_step
from tests.commands import alive, children, finish, start, wait_gone
from tests.faults import TIMEOUT, limit, run_with_fault
from tests.test_train_cli import wait_for_step

CONFIG = """
[model]
layers = 2
width = 32
heads = 2
vocab_size = 257
sequence_length = 32
dropout = 0.1
[data]
path = "{data}"
[parallel]
timeout = 5.0
[optimizer]
lr = 3e-3
[train]
steps = {steps}
batch = 2
precision = "fp32"
save_every = 3
log_every = 1
"""
STEPS = 14


@pytest.fixture(scope="module")
def config(tiny_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(CONFIG.format(data=tiny_data, steps=STEPS))
    return path


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """`unbroken(nproc, tp)`: the state of a run under this layout from start to end."""
    made: dict[tuple[int, int], dict] = {}

    def state(nproc: int, tp: int) -> dict:
        if (nproc, tp) not in made:
            run = tmp_path_factory.mktemp("unbroken") / "run"
            finish(start("train", config, "--out", run, "--nproc", nproc, "--parallel.tp", tp))
            made[nproc, tp] = final_state(run)
        return made[nproc, tp]

    return state


@pytest.fixture
def broken(tiny_data, tmp_path):
    """`broken(rank=1, step=3, kind="kill", where="step")` -> how that run ended."""
    return partial(run_with_fault, tiny_data, tmp_path / "run")


def final_state(run: Path) -> dict:
    """SHA-256 of every file of tensors (parameters and moments), the cursor and counts, and the losses."""
    manifest = read_manifest(newest(run / "ckpt"))
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "files": {name: entry.sha256 for name, entry in manifest.files.items()},
        "state": {key: value for key, value in manifest.state.items() if key != "config"},
        "losses": [(r["step"], r["loss"], r["gradient_norm"]) for r in records],
    }


def kill_somebody(chance: random.Random, config: Path, run: Path, nproc: int, tp: int, who: str) -> str:
    """Train; kill -9 `who` at a random step: the launcher, one worker (it restarts by itself), or all at once."""
    process = start("train", config, "--out", run, "--nproc", nproc, "--parallel.tp", tp)
    wait_for_step(run, chance.randrange(STEPS - 4), process)
    time.sleep(chance.random() * 0.2)
    workers = children(process.pid)
    victims = {"launcher": [process.pid], "worker": [chance.choice(workers)], "all": [process.pid, *workers]}[who]
    for pid in victims:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    if who == "worker":
        return finish(process)
    process.communicate(timeout=60)
    wait_gone(workers)
    return finish(start("train", "--resume", run))


def check_kill(seed: int, config: Path, unbroken, tmp_path: Path) -> None:
    chance = random.Random(seed)
    who = ("worker", "launcher", "all")[seed % 3]
    nproc, tp = ((2, 2), (1, 1), (2, 1))[seed // 3 % 3]
    run = tmp_path / "run"
    output = kill_somebody(chance, config, run, nproc, tp, who)
    assert final_state(run) == unbroken(nproc, tp), output
    if who == "worker":
        assert "died by SIGKILL" in output
        assert "fresh processes go on from" in output


@pytest.mark.promise("R1")
@pytest.mark.parametrize("seed", [0])
def test_kill_9_at_a_random_step_changes_no_bit(seed, config, unbroken, tmp_path):
    check_kill(seed, config, unbroken, tmp_path)


@pytest.mark.slow
@pytest.mark.promise("R1")
@pytest.mark.parametrize("seed", [7, 5, *range(100, 147)])
def test_kill_9_many_times(seed, config, unbroken, tmp_path):
    check_kill(seed, config, unbroken, tmp_path)


# --- the supervisor ---


@pytest.mark.slow
@pytest.mark.promise("R9")
def test_fresh_processes_go_on_from_the_newest_checkpoint(broken):
    """Rank 1 dies at step 4 in each of its first two starts; the third comes through."""
    ended = broken(rank=1, step=4, kind="kill", where="step", times=2, restarts=2)
    assert ended.code == 0, ended.output
    for restart in (1, 2):
        assert f"go on from the checkpoint of step 3 (restart {restart} of 2 without a newer one)" in ended.output
    assert ended.output.count("resumed from") == 2
    steps = [r["step"] for r in read_metrics(ended.run / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(8))


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    ("reached", "tries"),
    [([-1, -1, -1], 3), ([3, 3, 3], 3), ([3, 3, 6, 6, 6], 5), ([3, 6, 9, 12, 15, 15, 15], 7)],
)
def test_restarts_count_only_while_there_is_no_newer_checkpoint(monkeypatch, tmp_path, reached, tries):
    """`reached`: the newest checkpoint after each try, all of which fail; two restarts."""
    steps, made = iter([-1, *reached]), []
    monkeypatch.setattr(supervisor, "newest_step", lambda run: next(steps))
    monkeypatch.setattr(Supervisor, "_try", lambda self: made.append(1) or End(1, "rank 0 died", again=True))
    assert Supervisor(tmp_path, 1, restarts=2).train() == 4
    assert len(made) == tries


@pytest.mark.promise("R9")
def test_what_fresh_processes_cannot_mend_is_not_tried_again(monkeypatch, tmp_path):
    made = []
    for end in (End(0), End(2), End(3), End(143), End(1, "no space", again=False)):
        monkeypatch.setattr(Supervisor, "_try", lambda self, end=end: made.append(1) or end)
        assert Supervisor(tmp_path, 1, restarts=3).train() == end.code
    assert len(made) == 5
    monkeypatch.setattr(Supervisor, "_try", lambda self: made.append(1) or End(1, "rank 0 died", again=True))
    assert Supervisor(tmp_path, 1, restarts=0).train() == 1
    assert len(made) == 6


@pytest.mark.slow
@pytest.mark.promise("R9")
def test_gives_up_without_progress(broken):
    ended = broken(rank=0, step=1, kind="kill", where="step", times=99, restarts=2, nproc=1)
    assert ended.code == 4, ended.output
    assert ended.output.count("fresh processes go on from the beginning: there is no checkpoint yet") == 2
    assert "given up: 2 restarts in a row brought no newer checkpoint; last: rank 0 died by SIGKILL" in ended.output
    assert (ended.run / "fault.times").read_text() == "3"


@pytest.mark.slow
@pytest.mark.promise("R9")
@pytest.mark.parametrize("kind", ["kill", "stop", "raise", "skip", "shape", "memory"])
def test_resumes_in_ten_seconds(broken, kind):
    """From the fault to the end of a run that has two steps left; hanging collectives have their time-out besides."""
    ended = broken(rank=1, step=4, kind=kind, where="step", restarts=1, steps=6)
    assert ended.code == 0, ended.output
    assert ended.seconds <= limit(10) + (TIMEOUT if kind in ("stop", "skip", "shape") else 0)


def test_newest_step_needs_a_manifest_that_can_be_read(tmp_path):
    (tmp_path / "ckpt" / "step-00000009").mkdir(parents=True)
    (tmp_path / "ckpt" / "step-00000009" / "manifest.json").write_text(json.dumps({"step": 9}))
    assert newest_step(tmp_path) == -1


# --- signals (R10) ---


def stopped_by(config: Path, run: Path, *numbers: int, after: float = 0.0) -> tuple[int, str, list[int]]:
    process = start("train", config, "--out", run, "--nproc", 2, "--train.steps", 5000, "--train.save_every", 2)
    wait_for_step(run, 2, process)
    workers = children(process.pid)
    for number in numbers:
        time.sleep(after)
        process.send_signal(number)
    output = process.communicate(timeout=90)[0]
    wait_gone(workers)
    return process.returncode, output, workers


@pytest.mark.slow
@pytest.mark.promise("R10")
def test_sigusr1_saves_at_the_next_step_boundary(config, tmp_path):
    run = tmp_path / "run"
    code, output, _ = stopped_by(config, run, signal.SIGUSR1)
    done = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert code == 128 + signal.SIGUSR1, output
    assert newest(run / "ckpt").name == f"step-{len(done):08d}"
    assert "fresh processes" not in output


@pytest.mark.promise("R10")
def test_a_second_signal_leaves_at_once_and_the_checkpoints_stay_sound(config, tmp_path):
    """It saves every second step, so that the signals often fall into a save."""
    run = tmp_path / "run"
    code, output, _ = stopped_by(config, run, signal.SIGTERM, signal.SIGINT)
    assert code in (128 + signal.SIGINT, 128 + signal.SIGTERM), output  # the first may have had its way already
    assert verify(newest(run / "ckpt")) == []
    assert "fresh processes" not in output


@pytest.mark.slow
@pytest.mark.promise("R10")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGUSR1,), (signal.SIGINT,) * 2])
def test_signals_at_random_times(config, tmp_path, numbers, seed):
    run = tmp_path / "run"
    code, output, _ = stopped_by(config, run, *numbers, after=random.Random(seed).random())
    assert code == 128 + numbers[-1], output
    assert verify(newest(run / "ckpt")) == []


@pytest.mark.slow
@pytest.mark.promise("R10")
def test_a_stopped_worker_does_not_outlive_a_second_signal(config, tmp_path):
    """The other worker waits in a collective, where Python hears no signal: the launcher ends both."""
    run = tmp_path / "run"
    process = start("train", config, "--out", run, "--nproc", 2, "--train.steps", 5000, "--parallel.timeout", 100)
    wait_for_step(run, 1, process)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130, output
    wait_gone(workers)
