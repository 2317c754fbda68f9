"""The record of where a rank is: read after SIGKILL, cheap, and the same on ranks that did the same. No GPU needed."""

from __future__ import annotations

import ast
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from tests.checkpoints import start_child

PACKAGE = Path(trace.__file__).resolve().parent.parent


def test_the_record_of_a_killed_process_is_whole(tmp_path):
    def work() -> None:
        trace.start(tmp_path / "rank", 3, 4)
        trace.begin_step(41)
        trace.phase("forward of micro-batch 1 of 1")
        trace.begin_step(42)
        trace.phase("backward of micro-batch 2 of 2")
        trace.collective("all_reduce", torch.zeros(4, 8, dtype=torch.bfloat16), None)
        trace.collective("barrier", None, None)
        os.kill(os.getpid(), signal.SIGKILL)

    pid, out = start_child(work)
    os.close(out)
    os.waitpid(pid, 0)
    place = trace.read(tmp_path / "rank")
    assert (place.rank, place.world, place.pid, place.step) == (3, 4, pid, 42)
    assert place.phase == "backward of micro-batch 2 of 2"
    assert place.failure is None
    assert [str(c) for c in place.collectives] == [
        "all_reduce [4, 8] bfloat16 over all ranks, collective 1 of step 42",
        "barrier over all ranks, collective 2 of step 42",
    ]


def test_the_last_collectives_are_kept_and_a_torn_entry_is_left_out(tmp_path):
    recorder = trace.Recorder(tmp_path / "rank", 0, 1)
    recorder.begin_step(7)
    for size in range(1, trace.KEPT + 50):
        recorder.collective("all_reduce", torch.zeros(size), None)
    place = trace.read(tmp_path / "rank")
    assert [c.index for c in place.collectives] == list(range(50, trace.KEPT + 50))
    assert place.last.text == f"all_reduce [{trace.KEPT + 49}] float32 over all ranks"
    raw = bytearray((tmp_path / "rank").read_bytes())
    slot = trace._RING + (recorder.number % trace.KEPT) * trace._ENTRY.size
    raw[slot] ^= 1  # the first count is not the last count: the process died between the two
    (tmp_path / "torn").write_bytes(raw)
    assert trace.read(tmp_path / "torn").last.index == trace.KEPT + 48


def test_the_first_failure_stays(tmp_path):
    recorder = trace.Recorder(tmp_path / "rank", 0, 1)
    recorder.fail("error", "é" * 5000)
    recorder.fail("collective", "connection closed")
    failure = trace.read(tmp_path / "rank").failure
    assert failure["kind"] == "error"
    assert set(failure["text"]) == {"é"}


def test_what_is_no_record_reads_as_none(tmp_path):
    assert trace.read(tmp_path / "absent") is None
    (tmp_path / "other").write_bytes(b"x" * trace.SIZE)
    assert trace.read(tmp_path / "other") is None


def test_digest_tells_other_shapes_dtypes_operations_order_and_steps(tmp_path):
    def digest(step: int, *calls: tuple) -> int:
        recorder = trace.Recorder(tmp_path / "rank", 0, 1)
        recorder.collective("barrier", None, None)  # before the step: does not count
        recorder.begin_step(step)
        for op, tensor in calls:
            recorder.collective(op, tensor, None)
        return recorder.digest

    a, b = ("all_reduce", torch.zeros(4, 8)), ("all_gather", torch.zeros(4, 8))
    runs = [
        digest(3, a, b),
        digest(4, a, b),
        digest(3, b, a),
        digest(3, a),
        digest(3, a, b, b),
        digest(3, a, ("all_gather", torch.zeros(8, 4))),
        digest(3, a, ("all_gather", torch.zeros(4, 8, dtype=torch.float64))),
    ]
    assert len(set(runs)) == len(runs)
    assert digest(3, a, b) == runs[0]


def test_a_record_takes_microseconds(tmp_path):
    """A loose bound, for a loaded machine: 20 records a layer and step at 50 us are 1 ms."""
    recorder = trace.Recorder(tmp_path / "rank", 0, 1)
    x, best = torch.zeros(4, 8), 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(200):
            recorder.collective("all_reduce", x, None)
        best = min(best, (time.perf_counter() - started) / 200)
    assert best < 50e-6


def test_a_finished_process_is_told_from_a_later_one_of_its_id():
    pid, out = start_child(lambda: time.sleep(30))
    os.close(out)
    ticks = trace.started_ticks(pid)
    assert ticks >= trace.started_ticks(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 5
    while trace.process_state(pid) != "T":
        assert time.monotonic() < end
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert trace.process_state(pid) is None
    assert trace.started_ticks(pid) is None


COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_gather_single", "_all_gather_single", "reduce_scatter_single", "_reduce_scatter_single"),
    *("all_to_all", "all_to_all_single", "broadcast", "gather", "scatter", "reduce", "barrier", "send", "recv"),
}


def collectives_of(function: ast.AST) -> tuple[int, int]:
    """How many calls of torch's collectives, and how many records of one, a function holds."""
    calls = [ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
    made = sum(call.removeprefix("dist.") in COLLECTIVES and call.startswith(("dist.", "_")) for call in calls)
    return made, calls.count("trace.collective") + calls.count("_record")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_collective_is_recorded(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        made, recorded = collectives_of(function)
        assert recorded >= made, f"{path.name}: {function.name} makes a collective without trace.collective before it"


def timeouts_of_groups() -> dict[str, float]:
    parallel = ParallelContext.create(tp=2, dp=2)
    seconds = {}
    for dim in ("tp", "dp"):
        backend = parallel.group(dim)._get_backend(torch.device("cpu"))
        seconds[dim] = backend.options._timeout.total_seconds()
    seconds["world"] = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


def test_the_groups_of_a_mesh_have_the_timeout_of_the_world(ranks):
    """Left alone, torch gives them 30 minutes."""
    for seconds in ranks.run(timeouts_of_groups, 4):
        assert seconds == {"tp": 60.0, "dp": 60.0, "world": 60.0}
