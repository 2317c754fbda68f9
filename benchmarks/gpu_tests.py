"""The tests of a machine with a GPU: in parallel where pytest-xdist is there, to the end, and every failure in a line.

As a pytest plugin (`-p benchmarks.gpu_tests --report FILE`) this module writes what becomes of each test to a file
while pytest runs, so that nothing is lost when time is up. An error of the GPU ends all later work of its process: a
worker leaves after one and xdist starts another; what failed so is run again, each test in a process of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POISON = re.compile(r"CUDA error|Triton Error \[CUDA\]|illegal memory access|device-side assert|worker .* crashed")
LIMIT = 120  # seconds of one test, most of them compilation: longer is a kernel that hangs
AGAIN = 24  # tests to run again alone, at most


@dataclasses.dataclass(frozen=True)
class Outcome:
    passed: int
    skipped: int
    failures: dict[str, str]
    """Test id -> the first line of its error."""
    unfinished: bool
    """True where time was up, or pytest itself failed, before all tests had run."""
    seconds: float


# --- the plugin ---


def pytest_addoption(parser):
    parser.addoption("--report", metavar="FILE", help="append the outcome of each test to FILE, a JSON object a line")


def pytest_configure(config):
    file = config.getoption("--report")
    worker = hasattr(config, "workerinput")
    if file:
        config.pluginmanager.register(_Leave() if worker else _Report(Path(file)), "gpu_tests_report")


class _Report:
    def __init__(self, file: Path) -> None:
        self.file = file

    def _write(self, **record) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._write(id=report.nodeid, outcome=report.outcome, line=_line(report), seconds=report.duration)

    def pytest_collectreport(self, report):
        if report.failed:
            self._write(id=report.nodeid, outcome="failed", line=_line(report), seconds=0.0)

    def pytest_sessionfinish(self):
        self._write(id="", outcome="finished", line="", seconds=0.0)


class _Leave:
    """In a worker of xdist: leave after an error of the GPU."""

    poisoned = False

    def pytest_runtest_logreport(self, report):
        self.poisoned |= report.failed and POISON.search(str(report.longrepr)) is not None

    def pytest_runtest_logfinish(self):
        if self.poisoned:
            os._exit(3)


def _line(report) -> str:
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:300] if lines else ""


# --- the runs ---


def command(paths: list[str], report: Path, options: list[str], parallel: bool) -> list[str]:
    """pytest over `paths` with what this Python has installed."""
    words = [sys.executable, "-m", "pytest", *paths, "-p", "benchmarks.gpu_tests", "--report", str(report)]
    words += ["-p", "no:cacheprovider", "--rootdir", ".", "--tb=short", "-q", *options]
    if importlib.util.find_spec("pytest_timeout"):
        words += [f"--timeout={LIMIT}", "--timeout-method=thread"]
    if parallel and importlib.util.find_spec("xdist"):
        from megakern.train import machine  # here, as the plugin is imported by each pytest: torch takes 1.5 s

        workers = max(1, min(12, machine.cores() - 2))
        words += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "200"]
    return words


def run_tests(
    paths: list[str], folder: Path, name: str, deadline: float, options: list[str], root: Path = ROOT
) -> Outcome:
    """Runs `paths`, relative to `root`, until `deadline` (time.monotonic()); writes name.log and .jsonl to `folder`."""
    started, report = time.monotonic(), folder / f"{name}.jsonl"
    report.unlink(missing_ok=True)
    with (folder / f"{name}.log").open("w") as log:
        _until(deadline, command(paths, report, options, parallel=True), log, root)
        passed, skipped, failures, finished = _read(report)
        poisoned = [test for test, line in failures.items() if POISON.search(line) and "::" in test]

        def again(numbered: tuple[int, str]) -> tuple[str, dict[str, str], bool]:
            """-> the test, what failed, whether it passed."""
            index, test = numbered
            own = folder / f"{name}.again{index}.jsonl"
            own.unlink(missing_ok=True)
            _until(deadline, command([test], own, options, parallel=False), log, root)
            passed, _, found, _ = _read(own)
            own.unlink(missing_ok=True)
            return test, found, passed == 1

        with ThreadPoolExecutor(4) as pool:
            for test, found, good in pool.map(again, enumerate(poisoned[:AGAIN])):
                if good and not found:
                    del failures[test]
                    passed += 1
                elif found:
                    failures[test] = f"{next(iter(found.values()))} (alone in a process)"
    return Outcome(passed, skipped, failures, not finished, time.monotonic() - started)


def _until(deadline: float, words: list[str], log, root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        words, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def _read(report: Path) -> tuple[int, int, dict[str, str], bool]:
    if not report.exists():
        return 0, 0, {"pytest": "it wrote no report; see the log"}, False
    records = [json.loads(line) for line in report.read_text().splitlines()]
    failures = {record["id"]: record["line"] for record in records if record["outcome"] == "failed"}
    count = collections.Counter(record["outcome"] for record in records if record["id"] not in failures)
    return count["passed"], count["skipped"], failures, count["finished"] > 0
