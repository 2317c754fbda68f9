"""The example scripts do what they say: two nodes of torchrun on this machine; Slurm's commands replaced by ours."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megakern.train.metrics import read_metrics
from tests.test_train_cli import CONFIG

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def config(tiny_data, tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(data=tiny_data))
    return path


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.slow
def test_two_nodes_of_torchrun_give_the_losses_of_one_machine(config, tmp_path):
    """One process on each of two nodes, tensor parallel across them."""
    words = ["train", config, "--out", tmp_path / "alone", "--parallel.tp", "1"]
    subprocess.run([sys.executable, "-m", "megakern", *words], cwd=ROOT, check=True, capture_output=True, timeout=120)
    nodes = start_nodes(config, tmp_path / "run")
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start_nodes(config: Path, run: Path) -> list[subprocess.Popen]:
    port = str(free_port())
    bins = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    common = {**os.environ, "PATH": bins, "NODES": "2", "HOST": "127.0.0.1", "PORT": port, "PER_NODE": "1"}
    words = ["bash", str(EXAMPLES / "torchrun.sh"), str(config), str(run)]
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={**common, "NODE_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def test_torchrun_script_names_what_is_missing():
    clean = {key: value for key, value in os.environ.items() if key not in ("NODES", "NODE_RANK", "HOST")}
    done = subprocess.run(
        ["bash", EXAMPLES / "torchrun.sh"], env=clean, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode != 0
    assert "NODES: number of machines" in done.stderr


@pytest.mark.parametrize(("code", "requeued", "result"), [(0, False, 0), (138, True, 0), (1, False, 1), (3, False, 3)])
def test_slurm_script_queues_again_only_after_a_stop_in_time(tmp_path, code, requeued, result):
    """srun and scontrol note their words; srun ends with `code`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, status in (("srun", code), ("scontrol", 0)):
        path = tools / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/said"\nexit {status}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh", "c.toml", run, "--parallel.tp", "8"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"},
        timeout=20,
        check=False,
    )
    said = (tmp_path / "said").read_text().splitlines()
    assert done.returncode == result
    assert said[0].endswith(f"megakern train --resume {run} --parallel.tp 8")
    assert ("scontrol requeue 77" in said) == requeued
