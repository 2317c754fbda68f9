"""A short run of tiny workers, one of which fails on purpose (tests/faulty_worker.py), and how that run ended."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from megakern.config import GPTConfig
from megakern.train.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megakern.train.run import new_run
from megakern.train.supervisor import Supervisor
from tests.commands import Command

TIMEOUT = 4.0  # seconds, of each collective
MODEL = GPTConfig(layers=2, width=32, heads=2, vocab_size=257, sequence_length=32, dropout=0.1)


def limit(seconds: float) -> float:
    """`seconds` on a machine with nothing else to do; much more when other programs, or tests, want its cores too."""
    load = os.getloadavg()[0] / os.cpu_count()
    alone = load < 1.2 and "PYTEST_XDIST_WORKER" not in os.environ
    return seconds if alone else 2 * load * seconds + 10


@dataclass
class Ended:
    """A run that met a fault. `seconds`: from the fault to the end of the last of its processes."""

    run: Path
    code: int
    output: str
    seconds: float
    report: str


def run_with_fault(
    data: Path,
    run: Path,
    *,
    nproc: int = 2,
    dp: int = 1,
    restarts: int = 0,
    steps: int = 8,
    save_every: int = 3,
    fork: bool | None = None,
    **fault,
) -> Ended:
    """`fork`: False for workers that are fresh interpreters.

    `fault`: what tests/faulty_worker.py reads, as rank=1, step=3, kind="kill", where="step".
    """
    config = RunConfig(
        model=MODEL,
        data=DataConfig(path=str(data)),
        parallel=ParallelConfig(tp=nproc // dp, dp=dp, timeout=TIMEOUT),
        optimizer=OptimizerConfig(lr=3e-3),
        train=TrainConfig(steps=steps, batch=2, precision="fp32", save_every=save_every, log_every=1),
    )
    new = new_run(config, run, nproc)
    new.create()
    (run / "fault.json").write_text(json.dumps({**fault, "tp": nproc // dp}))
    process = Command(train_with_fault, run, nproc, restarts, fork)
    output, _ = process.communicate(timeout=150)  # returns when no process of the run is left
    ended = time.time()
    assert (run / "fault.moment").exists(), f"the fault did not happen:\n{output}"
    reports = sorted(run.glob("failure-*.txt"))
    return Ended(
        run,
        process.returncode,
        output,
        seconds=ended - float((run / "fault.moment").read_text()),
        report=reports[-1].read_text() if reports else "",
    )


def train_with_fault(run: Path, nproc: int, restarts: int, fork: bool | None) -> int:
    return Supervisor(run, nproc, restarts=restarts, worker="tests.faulty_worker", fork=fork).train()
