"""A rank that dies, stops, raises or does something else ends every process in time, with one clear message. No GPU."""

from __future__ import annotations

import re
from functools import partial

import pytest

from megakern.train.checkpoint import newest, verify
from tests.faults import TIMEOUT, Ended, limit, run_with_fault


@pytest.fixture
def broken(tiny_data, tmp_path):
    """`broken(rank=1, step=3, kind="kill", where="step")` -> how that run ended."""
    return partial(run_with_fault, tiny_data, tmp_path / "run")


# what -> what the message says of rank 1
SAYS = {
    "kill": r"rank 1 died by SIGKILL",
    "stop": r"rank 1 is stopped \(SIGSTOP",
    "raise": r"rank 1 raised ArithmeticError: a fault of the test",
    "oom": r"rank 1 raised OutOfMemoryError: CUDA out of memory",
    "memory": r"rank 1 raised \w*Error: .*(alloc|memory)",
    # After a save there may be no collective left that both have made: then it tells where each of the two is.
    "skip": r"rank 1 called .*; rank 0 called|rank 0 (died by SIGABRT.*; rank 1 was at|is behind.*; rank 1 waited in)"
    r"|rank 1 is behind.*; rank 0 waited in",
    "shape": r"rank 1 called .*; rank 0 called .* there: the ranks no longer do the same",
    "garbage": r"rank 1 called .*; rank 0 called .* there: the ranks no longer do the same",
}
# What happens, where, and the data-parallel size of two ranks; tensor-parallel is the rest.
# The second with workers that are fresh interpreters, as on GPUs.
SHORT = [("stop", "step", 1, True), ("raise", "save", 1, False)]
FULL = [
    (kind, where, dp)
    for kind in SAYS
    for where in ("step", "save")
    for dp in (1, 2)
    if kind != "garbage" or (where, dp) == ("step", 1)
]


def check(ended: Ended, kind: str, where: str) -> None:
    assert ended.code == {"kill": 137}.get(kind, 1), ended.output
    hangs = kind not in ("kill", "raise", "oom", "memory")
    assert ended.seconds <= limit(2) + (TIMEOUT if hangs else 0), ended.output
    if where == "save" and kind in ("raise", "oom", "memory"):
        # A save tells every rank of a failure on one: all end with the same error, which names the rank.
        assert re.search(r"saving step 6 .* failed: rank 1: \w*Error: ", ended.output), ended.output
    else:
        message = next(line for line in ended.output.splitlines() if line.startswith("megakern: rank"))
        assert re.search(SAYS[kind], message), ended.output
        assert re.search(r"step 4\b" if where == "step" else r"after step 6|step 5\b", message), ended.output
        assert re.search(r"all_reduce \[|all_gather \[", message), ended.output
        assert "rank 0" in ended.output
        for rank in (0, 1):
            assert f"rank {rank}: its last collectives" in ended.report
        assert "Python stack" in ended.report
    assert newest(ended.run / "ckpt").name == "step-00000003"
    assert verify(newest(ended.run / "ckpt")) == []


@pytest.mark.promise("R9")
@pytest.mark.parametrize(("kind", "where", "dp", "fork"), SHORT)
def test_a_failing_rank_ends_every_process_and_is_named(broken, kind, where, dp, fork):
    check(broken(rank=1, step=4 if where == "step" else 6, kind=kind, where=where, dp=dp, fork=fork), kind, where)


@pytest.mark.slow
@pytest.mark.promise("R9")
@pytest.mark.parametrize(("kind", "where", "dp"), FULL)
def test_every_fault_everywhere(broken, kind, where, dp):
    check(broken(rank=1, step=4 if where == "step" else 6, kind=kind, where=where, dp=dp), kind, where)
