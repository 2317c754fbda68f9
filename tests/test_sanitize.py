"""`make sanitize` with a stand-in for compute-sanitizer: what it runs, and what it takes for a clean run."""

from __future__ import annotations

import sys

import pytest

from benchmarks import sanitize


def test_the_tool_looks_at_our_kernels_alone_in_the_tests_of_the_cuda_backend():
    words = sanitize.command("/bin/compute-sanitizer", "racecheck", ["tests/kernels/test_norm.py"])
    assert words[:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]
    assert words[words.index("--kernel-name") + 1] == "kns=megakern"
    tests = words[words.index(sys.executable) :]
    assert tests[1:3] == ["-m", "pytest"] and tests[-1] == "tests/kernels/test_norm.py"
    assert tests[tests.index("-k") + 1].startswith("cuda and ")


@pytest.mark.parametrize(
    ("program", "clean", "line"),
    [
        ("print('31 passed in 2.1s')", True, "memcheck   clean, 31 tests,"),
        ("print('31 passed'); raise SystemExit(86)", False, "memcheck   found errors, 31 tests,"),
        ("print('1 failed, 30 passed'); raise SystemExit(1)", False, "memcheck   exit status 1, 30 tests,"),
        ("print('31 deselected'); raise SystemExit(5)", False, "memcheck   exit status 5, 0 tests,"),
        ("print('no tests ran')", False, "memcheck   exit status 0, 0 tests,"),
        ("import time; time.sleep(60)", False, "memcheck   not done after 1 s"),
    ],
)
def test_a_clean_run_has_tests_and_no_finding(program, clean, line, monkeypatch):
    monkeypatch.setattr(sanitize, "command", lambda *_: [sys.executable, "-c", program])
    found, said, _ = sanitize.run("compute-sanitizer", "memcheck", [], limit=1 if "sleep" in program else 60)
    assert found is clean and said.startswith(line)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sanitize.UNAVAILABLE, "cuda", "it needs an NVIDIA GPU")
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    with pytest.raises(SystemExit):
        sanitize.main()
    assert "the cuda backend is not usable: it needs an NVIDIA GPU" in capsys.readouterr().err
