"""The table of promises counts what ran: trials, failures, tests that were skipped. About 6 s, a pytest of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import _faults_table

ROOT = Path(__file__).resolve().parent.parent

TESTS = """
import pytest

@pytest.mark.promise("R2")
def test_many(trials):
    for _ in range(7):
        trials()

@pytest.mark.promise("R2", "R3")
def test_one(): pass

@pytest.mark.promise("R3")
def test_fails_in_the_third(trials):
    for number in range(5):
        trials()
        assert number < 2

@pytest.mark.promise("R10")
def test_skipped():
    pytest.skip("no such thing here")

@pytest.mark.promise("R11")
@pytest.mark.parametrize("n", [1, 2])
def test_both_layouts(trials, n):
    trials(10 * n)

@pytest.fixture
def broken():
    raise OSError

@pytest.mark.promise("R12")
def test_without_its_fixture(broken): pass

def test_of_something_else(): assert False
"""


def run(folder: Path, tests: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    (folder / "test_some.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = promise\n")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "promise", "--faults", str(folder / "out" / "faults.json")]
    return subprocess.run(
        [*command, "--rootdir", str(folder), "-c", str(folder / "pytest.ini"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_counts(tmp_path):
    done = run(tmp_path, TESTS)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "faults.json").read_text())["rows"]
    assert [(row["id"], row["trials"], row["failures"], row["skipped"], row["verdict"]) for row in rows] == [
        ("R2", 8, 0, 0, "kept"),
        ("R3", 4, 1, 0, "broken"),
        ("R10", 0, 0, 1, "not tested here"),
        ("R11", 30, 0, 0, "kept"),
        ("R12", 1, 1, 0, "broken"),
    ]
    assert "R2       8 trials    0 failures" in done.stdout
    assert _faults_table(rows).splitlines()[3].startswith("| R3 | disk full at every file operation")


@pytest.mark.parametrize("ids", ['"R99"', ""])
def test_an_unknown_promise_is_refused(tmp_path, ids):
    done = run(tmp_path, f"import pytest\n@pytest.mark.promise({ids})\ndef test_it(): pass\n")
    assert done.returncode != 0 and "must name one or more of R1, R2" in done.stdout + done.stderr
