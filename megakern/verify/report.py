"""The rows of a verification: each run beside the reference, its verdict, the table and the JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megakern.verify.tolerances import Measures

AGREES, DIFFERS, FAILED, NOT_RUN = "agrees", "differs", "failed", "not run"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run under one layout, precision and backend."""

    layout: str
    processes: int
    precision: str
    backend: str
    verdict: str
    """agrees, differs, failed (it did not end well), or not run."""
    reason: str = ""
    """What differs first, or why there is nothing to compare."""
    distance: Measures | None = None
    tolerance: Measures | None = None
    worst_parameter: str | None = None
    """The parameter whose gradient is farthest from the reference."""
    losses: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.layout} {self.precision} {self.backend}"


def judge(result: dict, reference: dict, tolerance: Measures, **names) -> Row:
    """The row of a run from what its rank 0 and the reference's wrote (worker.py). `names`: the row's first columns."""
    steps = [_relative(loss, expected) for loss, expected in zip(result["losses"], reference["losses"], strict=True)]
    names["losses"] = tuple(result["losses"])
    if "gradient" not in result:
        return Row(verdict=FAILED, reason="the gradient of step 1 is not finite, so it was skipped", **names)
    norms = [_relative(norm, expected) for norm, expected in zip(result["norms"], reference["norms"], strict=True)]
    distance = Measures(
        loss=_largest(steps),
        gradient=_largest([result["gradient"], *norms]),
        parameter=result["parameter"],
        update=result["update"],
    )
    reasons = []
    if result["initial"] is not None:
        reasons.append(f"the initial weights are not the reference's bit for bit: {result['initial']}")
    if not distance.loss <= tolerance.loss:
        first = _first_above(steps, tolerance.loss)
        reasons.append(f"the loss differs from step {first} on, by {steps[first - 1]:.1e} of it")
    if not (result["gradient"] <= tolerance.gradient and distance.parameter <= tolerance.parameter):
        reasons.append(
            f"the gradient of step 1 differs, most in {result['worst']}: by {distance.parameter:.1e} of its norm"
        )
    elif not distance.gradient <= tolerance.gradient:
        reasons.append(f"the gradient norm differs from step {_first_above(norms, tolerance.gradient)} on")
    if not distance.update <= tolerance.update:
        reasons.append(f"the weights after step {len(steps)} differ by {distance.update:.1e} of the way they went")
    return Row(
        verdict=DIFFERS if reasons else AGREES,
        reason="; ".join(reasons),
        distance=distance,
        tolerance=tolerance,
        worst_parameter=result["worst"],
        **names,
    )


def _first_above(differences: Sequence[float], bound: float) -> int:
    """The first step, counted from 1, whose difference is above `bound`."""
    return next(step for step, difference in enumerate(differences, 1) if not difference <= bound)


def _relative(value: float | None, expected: float) -> float:
    if value is None or not math.isfinite(value):
        return math.nan
    return abs(value - expected) / max(abs(expected), 1e-12)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows, and what was trained."""

    notes: tuple[str, ...]
    """What was trained, on which data, and what was changed for it."""
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        ran = [row for row in self.rows if row.verdict != NOT_RUN]
        return bool(ran) and all(row.verdict == AGREES for row in ran)

    def table(self) -> str:
        """The rows as aligned text; each distance beside the most it may be."""
        head = ("layout", "proc", "precision", "backend", "loss", "gradient", "update", "worst parameter", "verdict")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join(text)

    def conclusion(self) -> str:
        """The last lines: that all agree, or each row that does not, with what differs first."""
        ran = [row for row in self.rows if row.verdict != NOT_RUN]
        left = len(self.rows) - len(ran)
        also = f" ({left} not run)" if left else ""
        if not ran:
            return "nothing was compared: this machine can run none of the layouts"
        if self.passed:
            return f"all {len(ran)} runs agree with the reference{also}"
        bad = [row for row in ran if row.verdict != AGREES]
        lines = [f"{row.name}: {row.reason}" for row in bad]
        return "\n".join([*lines, f"{len(bad)} of {len(ran)} runs do not agree with the reference{also}"])

    def as_json(self) -> str:
        """The same as JSON, numbers in full; what is not finite is null, as JSON has no word for it."""

        def plain(value: object) -> object:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps(plain({"passed": self.passed, "notes": self.notes, "rows": rows}), indent=1) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.layout, str(row.processes), row.precision, row.backend)
    if row.distance is None:
        return (*start, "-", "-", "-", "-", row.verdict if row.verdict == FAILED else f"{row.verdict}: {row.reason}")
    pairs = {name: _pair(value, getattr(row.tolerance, name)) for name, value in vars(row.distance).items()}
    worst = f"{row.worst_parameter} {pairs['parameter']}"
    return (*start, pairs["loss"], pairs["gradient"], pairs["update"], worst, row.verdict)


def _pair(value: float, bound: float) -> str:
    return f"{value:.0e} < {bound:.0e}" if value <= bound else f"{value:.0e} > {bound:.0e}"
