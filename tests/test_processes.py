"""Ranks as forks and as fresh interpreters: they join, end with their own codes, and end with what started them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megakern.train import processes
from megakern.train.processes import Ranks, apart, can_fork
from tests.commands import Command, alive, finish, start, wait_gone
from tests.test_train_cli import CONFIG

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from megakern.train.config import ParallelConfig
from megakern.train.launch import join


def work(folder):
    rank = int(os.environ["RANK"])
    join(ParallelConfig(tp=2, timeout=20.0))
    total = torch.ones(3) * (rank + 1)
    dist.all_reduce(total)
    said = {"pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "total": total.tolist(),
            "threads": torch.get_num_threads(), "handler": str(signal.getsignal(signal.SIGTERM))}
    (folder / f"writing-{rank}").write_text(json.dumps(said))
    os.rename(folder / f"writing-{rank}", folder / f"said-{rank}")
    if (folder / "stay").exists():
        time.sleep(100)
    if (folder / "raise").exists():
        raise ValueError("of the test")
    return 5 + rank


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
"""


def use(folder: Path, fork: bool | None, what: str) -> int:
    """Starts two ranks of PROGRAM in this process; how they ended is left in the folder."""
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(folder))
    (folder / "program_of_ranks.py").write_text(PROGRAM)
    if what == "beside a thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if what == "stay":
        (folder / "stay").touch()
    if what == "raise":
        (folder / "raise").touch()
    ranks = Ranks("program_of_ranks", folder, 2, fork=fork)
    if what == "stay":
        wait_for(folder / "said-0", folder / "said-1")
        ranks.end()
    codes = [process.wait(timeout=60) for process in ranks.processes]
    (folder / "ended").write_text(json.dumps({"codes": codes, "pid": os.getpid(), "kind": kind_of(ranks)}))
    ranks.end()
    return 0


def kind_of(ranks: Ranks) -> str:
    return type(ranks.processes[0]).__name__


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} did not come"
        time.sleep(0.02)


def ended(folder: Path, fork: bool | None, what: str = "") -> tuple[dict, list[dict], str]:
    output = finish(Command(use, folder, fork, what))
    said = [json.loads((folder / f"said-{rank}").read_text()) for rank in range(2)]
    return json.loads((folder / "ended").read_text()), said, output


# Fresh interpreters take 3 s each: by default those of torchrun's test and of one failing run have to be enough.
@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "fresh"])
def test_ranks_join_and_end_with_their_codes(tmp_path, fork):
    end, said, _ = ended(tmp_path, fork)
    assert end["codes"] == [5, 6] and end["kind"] == ("Forked" if fork else "Popen")
    for rank in said:
        assert rank["parent"] == end["pid"] and rank["session"] == rank["pid"] and rank["total"] == [3.0] * 3
        assert rank["threads"] == 1 and rank["handler"] == "0", (
            "OMP_NUM_THREADS of the tests, and no handler of a parent"
        )


def test_forks_are_the_choice_where_they_are_safe(tmp_path):
    end, _, _ = ended(tmp_path, None, "raise")
    assert end["kind"] == "Forked" and end["codes"] == [1, 1]


def test_an_error_in_a_fork_is_printed(tmp_path):
    _, _, output = ended(tmp_path, True, "raise")
    assert output.count("ValueError: of the test") == 2


@pytest.mark.slow
def test_beside_a_second_thread_ranks_are_fresh(tmp_path):
    end, _, _ = ended(tmp_path, None, "beside a thread")
    assert end["kind"] == "Popen" and end["codes"] == [5, 6]


def test_the_end_leaves_no_process(tmp_path):
    end, said, _ = ended(tmp_path, True, "stay")
    assert end["codes"] == [-9, -9] and not any(alive(rank["pid"]) for rank in said)


def test_forks_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "stay").touch()
    command = Command(use, tmp_path, True, "")
    said = [tmp_path / "said-0", tmp_path / "said-1"]
    wait_for(*said)
    os.kill(command.pid, signal.SIGKILL)
    wait_gone([json.loads(path.read_text())["pid"] for path in said])


def use_threads(folder: Path) -> int:
    """What a process can do before and after a multiplication on two threads, here and in a child."""
    torch.set_num_threads(2)
    said = {"before": can_fork()}
    said["result"] = apart(lambda: [multiply(), os.getpid()])
    said["after a child's"] = can_fork()
    multiply()
    said["after its own"] = can_fork()
    said["here"] = apart(lambda: [multiply(), os.getpid()])
    (folder / "said").write_text(json.dumps({**said, "pid": os.getpid()}))
    return 0


def multiply() -> float:
    a = torch.ones(1000, 1000)
    return (a @ a)[0, 0].item()


def test_threads_of_a_part_of_the_work_stay_in_a_child(tmp_path):
    finish(Command(use_threads, tmp_path))
    said = json.loads((tmp_path / "said").read_text())
    assert said["before"] and said["after a child's"] and not said["after its own"]
    assert said["result"][0] == said["here"][0] == 1000.0
    assert said["result"][1] != said["pid"] and said["here"][1] == said["pid"]


def lose_a_child(folder: Path) -> int:
    with pytest.raises(RuntimeError, match="a part of its work ended with 7"):
        apart(lambda: os._exit(7))
    return 0


def test_a_child_that_dies_is_an_error(tmp_path):
    finish(Command(lose_a_child, tmp_path))


def test_not_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(processes.machine, "device_type", lambda: "cuda")
    assert not can_fork()


def test_a_reader_that_has_gone_ends_the_run_without_a_restart(tiny_data, tmp_path):
    """As with `| head`: rank 0 has nobody to print for, and rank 1 loses rank 0."""
    (tmp_path / "run.toml").write_text(CONFIG.format(data=tiny_data))
    command = start("train", tmp_path / "run.toml", "--out", tmp_path / "run", "--train.steps", "500")
    command.close_output()
    assert command.wait(60) == 141
    assert not list((tmp_path / "run").glob("failure-*.txt"))
