"""Which tests prove which promise: collects their trials in a run, and prints and writes one table of them.

    @pytest.mark.promise("R2")
    def test_kill(trials):
        for ...:
            trials()        # one more trial begins; trials(10) adds ten that were made at once

A test that does not say how many counts as one trial. `make faults` runs every such test, the slow ones too, with
`--faults FILE`; `benchmarks/tables.py` puts the committed file into docs/training.md.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.common import write_results

PROMISES = {
    "R1": "kill -9 at a random step, resume, run to the end: the same bits as the unbroken run",
    "R2": "kill -9 inside a save, at every file operation and at random times: nothing lost, mixed or unloadable",
    "R3": "disk full at every file operation, read-only folder, path vanishes: older one loads, message, no rest",
    "R4": "one flipped bit in a checkpoint: found, file and tensor named, older one taken",
    "R5": "truncated, empty, missing, extra, swapped, foreign files: found",
    "R6": "other names, shapes, dtypes, tokenizer: all named in one error, cast only on demand",
    "R7": "NaN in one gradient on one rank: all ranks skip the step, many in a row end the run with a code",
    "R9": "a rank killed, stopped, raising or diverging: all end in time, message, no orphans, supervisor resumes",
    "R10": "signals: saved at the next step boundary, documented exit code, a second one leaves at once",
    "R11": "saved under one (tp, dp), loaded under another: weights, moments and the first loss agree",
    "R12": "resumed at any step, with other intervals, after an async save: the same bits as the unbroken run",
    "R13": "samples seen over kills, other dp, ends of epochs: those of the unbroken run, each once",
    "R16": "async save: training is not altered, a crash before the commit loses nothing, saves do not pile up",
}

WRITE_EVERY = 20.0  # seconds: a run that is broken off leaves what it has found


@pytest.fixture
def trials(request):
    """`trials(n=1)`: n more trials begin in this test."""

    def begin(count: int = 1) -> None:
        request.node.trials = getattr(request.node, "trials", 0) + count

    return begin


class Promises:
    """The pytest plugin: rows by promise, of the tests that ran."""

    def __init__(self, file: str | None) -> None:
        self.file = Path(file) if file else None
        self.rows: dict[str, dict] = {}
        self.failed: list[str] = []
        self.started = self.written = time.perf_counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        ids = [name for marker in item.iter_markers("promise") for name in marker.args]
        if ids and (report.when == "call" or not report.passed):
            for name in ids:
                self._count(name, report, getattr(item, "trials", 1))
            if report.failed:
                self.failed.append(item.nodeid)
            if self.file and time.perf_counter() - self.written > WRITE_EVERY:
                self._write(complete=False)
        return report

    def _count(self, name: str, report: pytest.TestReport, count: int) -> None:
        row = self.rows.setdefault(
            name, {"id": name, "what": PROMISES[name], "trials": 0, "failures": 0, "skipped": 0, "seconds": 0.0}
        )
        if report.skipped:
            row["skipped"] += 1
        else:
            row["trials"] += count
            row["failures"] += report.failed  # a test ends at its first failure
            row["seconds"] += report.duration

    def table(self) -> list[dict]:
        """A row for each promise that was tested, with its verdict: kept, broken, or not tested here."""
        rows = sorted(self.rows.values(), key=lambda row: int(row["id"][1:]))
        return [
            {
                **row,
                "seconds": round(row["seconds"], 1),
                "verdict": "broken" if row["failures"] else "kept" if row["trials"] else "not tested here",
            }
            for row in rows
        ]

    def pytest_collection_modifyitems(self, items) -> None:
        for item in items:
            for marker in item.iter_markers("promise"):
                unknown = [name for name in marker.args if name not in PROMISES]
                if unknown or not marker.args:
                    raise pytest.UsageError(
                        f"{item.nodeid}: promise{marker.args} must name one or more of {', '.join(PROMISES)}"
                    )

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.file or not self.rows:
            return
        terminalreporter.write_sep("=", "promises")
        for row in self.table():
            terminalreporter.write_line(
                f"{row['id']:>4}  {row['trials']:>6} trials  {row['failures']:>3} failures  {row['seconds']:>7.1f} s  "
                f"{row['verdict']:<8}  {row['what']}"
            )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.file and self.rows:
            self._write(complete=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))

    def _write(self, *, complete: bool) -> None:
        """complete: false while tests are to come, and for ever when the run is broken off."""
        self.written = time.perf_counter()
        seconds = round(self.written - self.started)
        results = {"complete": complete, "seconds": seconds, "failed": self.failed, "rows": self.table()}
        write_results(self.file, results)
