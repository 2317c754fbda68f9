"""`megakern train` as users run it: whole processes, kills, signals, resumes, two gloo ranks. No GPU needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakern.parallel import shared, trace
from megakern.train import watch
from megakern.train.checkpoint import newest
from tests.commands import ROOT, Command, children, finish, launch, start, wait_gone
from tests.faults import limit
from tests.runs import losses

CONFIG = """
[model]
preset = "tiny-llama"
dropout = 0.1
vocab_size = 257
sequence_length = 32
[data]
path = "{data}"
[parallel]
tp = 2
[optimizer]
lr = 3e-3
warmup_steps = 2
[train]
steps = 12
batch = 4
micro_batch = 2
precision = "fp32"
save_every = 4
eval_every = 6
eval_batches = 2
log_every = 1
"""


@pytest.fixture(scope="module")
def config(tiny_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(CONFIG.format(data=tiny_data))
    return path


def wait_for_step(run: Path, step: int, process: Command | subprocess.Popen) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        if max(losses(run), default=-1) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached:\n{process.communicate(timeout=10)[0]}")


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    """A run of two ranks from start to end."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    output = finish(launch("train", config, "--out", run, "--nproc", 2))
    assert "held-out loss" in output
    assert "tokens/s" in output
    reason = shared.why_not()
    assert f"tensor parallel  2 ranks, {'shared memory' if reason is None else f'gloo: {reason}'}" in output
    return run


def test_files_of_a_run(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.toml", "tokenizer.json", "metrics.jsonl", "summary.json", "curve.png", "ckpt"} <= names
    assert newest(unbroken / "ckpt").name == "step-00000012"
    assert sorted(losses(unbroken)) == list(range(12))
    assert sorted(losses(unbroken, "eval")) == [5, 11]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--parallel.tp", 1), marks=pytest.mark.slow),
        pytest.param(("--parallel.sequence_parallel", "true"), marks=pytest.mark.slow),
        ("--parallel.tp", 1, "--parallel.dp", 2, "--train.micro_batch", 1, "--parallel.zero", 3),
    ],
    ids=["one", "sequence", "data"],
)
def test_other_layouts_give_the_losses_of_two_ranks(unbroken, config, tmp_path, layout):
    finish(start("train", config, "--out", tmp_path / "run", *layout))
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken), rel=1e-5)
    assert losses(tmp_path / "run", "eval") == pytest.approx(losses(unbroken, "eval"), rel=1e-5)


@pytest.mark.slow
def test_killed_worker_ends_the_run_with_a_message(config, tmp_path):
    run = tmp_path / "run"
    process = start("train", config, "--out", run, "--nproc", 2, "--restarts", 0, "--train.steps", 2000)
    wait_for_step(run, 1, process)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "rank 1 died by SIGKILL" in output
    wait_gone(workers)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signal_saves_at_the_next_step_and_resume_goes_on(unbroken, config, tmp_path, number, code):
    run = tmp_path / "run"
    process = start("train", config, "--out", run, "--nproc", 2)
    wait_for_step(run, 1, process)
    process.send_signal(number)
    output = finish(process, code)
    assert f"resume with: megakern train --resume {run}" in output
    done = len(losses(run))
    assert newest(run / "ckpt").name == f"step-{done:08d}"
    finish(start("train", "--resume", run, "--nproc", 2))
    assert losses(run) == losses(unbroken)


@pytest.mark.parametrize(
    ("more", "layout"),
    [
        (("--nproc", 1), "tp 1 x dp 1"),
        pytest.param(("--parallel.tp", 1, "--parallel.dp", 2), None, marks=pytest.mark.slow),
    ],
    ids=["fewer", "data"],
)
@pytest.mark.slow
def test_resume_under_another_layout(unbroken, config, tmp_path, more, layout):
    run = tmp_path / "run"
    process = start("train", config, "--out", run, "--nproc", 2)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    output = finish(start("train", "--resume", run, *more))
    assert layout is None or f"layout for 1 processes: {layout} (was tp 2 x dp 1)" in output
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)


def test_torchrun_joins_instead_of_starting_workers(unbroken, config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megakern"]
    words = ["train", str(config), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == losses(unbroken)


@pytest.mark.slow
def test_under_torchrun_one_rank_reports_and_ends_those_that_are_stopped(config, tmp_path):
    """torchrun itself would wait 30 s for a stopped process after its SIGTERM."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megakern"]
    words = ["train", str(config), "--out", str(run), "--train.steps", "5000", "--parallel.timeout", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(run, 1, process)
    workers = [trace.read(watch.trace_file(run, rank)).pid for rank in range(2)]
    os.kill(workers[1], signal.SIGSTOP)
    stopped = time.monotonic()
    wait_gone(workers, 4 + limit(2))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert time.monotonic() - stopped < 4 + limit(10)
    assert output.count("rank 1 is stopped (SIGSTOP, or a debugger), at step") == 1, output
    assert "Python stack" in next(run.glob("failure-*.txt")).read_text()
