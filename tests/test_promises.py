"""The table of promises counts what ran: trials, failures, tests that were skipped. Each in a pytest of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables
from tests.commands import Command

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


def run(folder: Path, tests: str) -> tuple[int, str]:
    """(exit code, output) of pytest over these tests."""
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    (folder / "test_some.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = promise\n")
    words = ["-q", "-m", "promise", "--faults", str(folder / "out" / "faults.json"), "--rootdir", str(folder)]
    process = Command(pytest.main, [*words, "-c", str(folder / "pytest.ini"), str(folder)])
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


def test_counts(tmp_path):
    code, output = run(tmp_path, TESTS)
    assert code == 1, output
    results = json.loads((tmp_path / "out" / "faults.json").read_text())
    rows = results["rows"]
    names = [name.split("::")[1] for name in results["failed"]]
    assert results["complete"] and names == ["test_fails_in_the_third", "test_without_its_fixture"]
    assert [(row["id"], row["trials"], row["failures"], row["skipped"], row["verdict"]) for row in rows] == [
        ("R2", 8, 0, 0, "kept"),
        ("R3", 4, 1, 0, "broken"),
        ("R10", 0, 0, 1, "not tested here"),
        ("R11", 30, 0, 0, "kept"),
        ("R12", 1, 1, 0, "broken"),
    ]
    assert "R2       8 trials    0 failures" in output
    assert tables._faults_table(rows).splitlines()[3].startswith("| R3 | disk full at every file operation")


BROKEN_OFF = """
import pytest
from tests import promises
promises.WRITE_EVERY = 0.0

@pytest.mark.promise("R1")
def test_first(): pass

@pytest.mark.promise("R2")
def test_killed():
    import os
    os._exit(9)
"""


def test_a_run_that_is_broken_off_leaves_what_it_found(tmp_path):
    assert run(tmp_path, BROKEN_OFF)[0] == 9
    file = tmp_path / "out" / "faults.json"
    results = json.loads(file.read_text())
    assert not results["complete"] and [row["id"] for row in results["rows"]] == ["R1"]
    with pytest.raises(SystemExit, match="broken off after"):
        tables.take(file)


def test_the_file_goes_to_the_results_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    facts = {"cpu": "A CPU (R) 9", "gpu": None, "cores": 2}
    (tmp_path / "results" / "known").mkdir(parents=True)
    (tmp_path / "results" / "known" / "train.json").write_text(json.dumps({"machine": facts}))
    file = tmp_path / "faults.json"
    for more, name in (({}, "known"), ({"cores": 4}, "a-cpu-r-9-4core")):
        file.write_text(json.dumps({"machine": {**facts, **more}, "complete": True, "seconds": 1, "rows": []}))
        assert tables.take(file) == tmp_path / "results" / name / "faults.json"
    with pytest.raises(SystemExit, match="make it with: make faults"):
        tables.take(tmp_path / "none.json")


@pytest.mark.parametrize("ids", ['"R99"', ""])
def test_an_unknown_promise_is_refused(tmp_path, ids):
    code, output = run(tmp_path, f"import pytest\n@pytest.mark.promise({ids})\ndef test_it(): pass\n")
    assert code != 0 and "must name one or more of R1, R2" in output
