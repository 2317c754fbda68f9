"""`make gpu` without a GPU, as far as it goes: every benchmark at tiny shapes, and what becomes of failing tests."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import gpu, gpu_tests, report, suite, tune, tune_linear, tune_overlap
from benchmarks.common import Case, Options, run


def test_every_benchmark_runs_at_tiny_shapes(tmp_path, capsys):
    assert gpu.main(["--tiny", "--only", "bench", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not timed" not in printed and "LEFT OUT" not in printed
    for op in suite.OPS:
        results = json.loads((tmp_path / f"{op}.json").read_text())
        assert results["limits"]["B"] > 0 and results["machine"]["cores"] > 0
        assert {"megakern"} < {row["contestant"] for row in results["rows"]}
        for row in results["rows"]:
            if "missing" in row:
                assert f"not here: {row['contestant']} ({row['missing']})" in printed
                continue
            assert row["us"] > 0 and row["rate"] > 0 and row["peak_bytes"] > 0, row
            assert f"| {row['op']} " in printed


TESTS = """
import os, pytest

@pytest.fixture
def broken_late():
    yield
    raise ValueError("teardown went wrong")

def test_good(): pass
def test_skipped(): pytest.skip("no reason")
def test_wrong(): assert 1 + 1 == 3, "one and one"
def test_late(broken_late): pass
def test_poisoned_by_another():
    if not os.path.exists("MARK"):  # the first time
        open("MARK", "w").close()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_poison(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_all_failures_are_found_and_those_of_the_gpu_run_again_alone(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS.replace("MARK", str(tmp_path / "mark")))
    outcome = gpu_tests.run_tests(["test_some.py"], tmp_path, "tests", time.monotonic() + 120, [], tmp_path)
    assert (outcome.passed, outcome.skipped, outcome.unfinished) == (2, 1, False)
    lines = {test.rpartition("::")[2]: line for test, line in outcome.failures.items()}
    assert lines.keys() == {"test_wrong", "test_late", "test_poison"}
    assert "one and one" in lines["test_wrong"] and "teardown went wrong" in lines["test_late"]
    assert "illegal memory access" in lines["test_poison"] and "alone in a process" in lines["test_poison"]


def test_tests_that_do_not_end_in_time_are_ended_and_told(tmp_path):
    (tmp_path / "test_long.py").write_text("import time\n\ndef test_endless(): time.sleep(1000)\n")
    outcome = gpu_tests.run_tests(["test_long.py"], tmp_path, "tests", time.monotonic() + 5, [], tmp_path)
    assert outcome.unfinished and outcome.passed == 0 and outcome.seconds < 60


def test_a_file_that_does_not_import_is_a_failure(tmp_path):
    (tmp_path / "test_bad.py").write_text("import no_such_module\n")
    outcome = gpu_tests.run_tests(["test_bad.py"], tmp_path, "tests", time.monotonic() + 60, [], tmp_path)
    assert len(outcome.failures) == 1 and "no_such_module" in str(outcome.failures)


def test_a_wrong_result_is_reported_and_not_timed(capsys):
    import torch

    def raises(x):
        raise ValueError("no such shape")

    contestants = {"megakern": lambda x: x + 1, "torch": lambda x: x, "other": raises, "third": lambda x: x}
    options = Options(shape=[], rounds=1, device=torch.device("cpu"))
    run("identity", options, [Case("3", contestants, (torch.ones(3),), 24, "B", None)])
    rows = {row["contestant"]: row for row in options.rows}
    assert rows["megakern"]["error"] == "differs from torch by 1.00e+00 of the largest value"
    assert rows["other"]["error"] == "ValueError: no such shape"
    assert rows["third"]["us"] > 0 and rows["torch"]["us"] > 0
    printed = capsys.readouterr().out
    assert "not timed: identity, 3, fp32, forward, megakern: differs from torch by" in printed
    assert "other: ValueError: no such shape" in printed
    # A peer's error is none of ours.
    assert [row["contestant"] for row in report.failures(options.rows)] == ["megakern"]


def test_a_peer_that_rounds_more_is_no_reason_against_ours():
    import torch

    def rounds(x):
        return x + 0.5 if x.dtype == torch.bfloat16 else x

    contestants = {"megakern": lambda x: x.clone(), "megakern wrong": lambda x: x + 1, "torch": rounds}
    options = Options(shape=[], rounds=1, patience=0.0, dtype="bf16", device=torch.device("cpu"))
    run("identity", options, [Case("3", contestants, (torch.ones(3).bfloat16(),), 24, "B", None)])
    rows = {row["contestant"]: row for row in options.rows}
    assert rows["megakern"]["us"] > 0 and "differs from torch" in rows["megakern wrong"]["error"]


def test_what_tuning_found_is_a_line_a_class(tmp_path):
    (tmp_path / "megakern").mkdir()
    times = {"linear M<=4096": {"of": "", "square": 30.0, "small": 20.25}}
    (tmp_path / "megakern" / "gpu.json").write_text(json.dumps(times))
    assert tune.tuned(tmp_path).splitlines()[1] == "linear M<=4096: square 30.0, small 20.2 BEST"


def test_every_table_has_its_script_and_a_script_that_fails_is_told(tmp_path, capsys):
    root = gpu_tests.ROOT / "benchmarks"
    assert {path.stem for path in root.glob("tune_*.py")} == {f"tune_{name}" for name in tune.SCRIPTS}
    if not gpu.torch.cuda.is_available():
        assert not tune.run(("norm",), tmp_path, time.monotonic() + 600)
        assert "tune norm: FAILED with exit code 1" in capsys.readouterr().out
    assert tune.run(("norm",), tmp_path, time.monotonic()) and "tune norm: LEFT OUT" in capsys.readouterr().out


def test_a_product_s_line_says_what_the_model_chose_and_what_was_best():
    race = {"what": "dx", "M": 8, "N": 16, "K": 24}
    rows = [
        {**race, "name": name, "x_cublas": share, "chosen": "square"}
        for name, share in {"cuBLAS": 1.0, "torch.compile": 1.2, "wide": 1.04, "square": 0.98}.items()
    ]
    other = {**race, "what": "epilogues", "name": "wide: bias", "x_cublas": 1.1, "chosen": ""}
    assert tune_linear.verdict([*rows, other]).splitlines()[2:] == [
        "| dx | 8 x 16 x 24 | square | 0.980 | wide | 1.040 |"
    ]


@pytest.mark.slow
def test_overlap_is_measured_over_processes_of_a_cpu(tmp_path, capsys):
    sizes = ["--rows", "8", "16", "--width", "32", "--turns", "1"]
    tune_overlap.main([*sizes, "--ranks", "2", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["rows"] for row in found["rows"]] == [8, 16] and found["transport"] in capsys.readouterr().out
    assert all(row["whole"] > 0 and row["in pieces"] > 0 for row in found["rows"])


def test_cases_after_the_deadline_are_left_out_and_named():
    options = Options(shape=[], deadline=time.monotonic() - 1)
    run("identity", options, [Case("3", {"megakern": lambda: None}, (), 1, "B", None)])
    assert options.rows == [] and options.left_out == ["identity 3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "norm,convolution", "--tiny"], "--ops: convolution: no such op; the ops are norm, attention"),
        (["--only", "tune", "--ops", "rope", "--tiny"], "--ops: rope: no such op; the ops are attention, linear, loss"),
        ([], "there is no NVIDIA GPU here; --tiny runs the suite without one"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err
