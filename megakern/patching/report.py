"""What `patch` did to a model, class by class, and why the rest was left as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """So many modules of one class. `what`: the op that computes them now, or the reason why none does."""

    part: str
    class_name: str
    what: str
    count: int


@dataclass(frozen=True)
class Report:
    """`print(report)` for a table; `swapped` and `kept` are its lines."""

    model: str
    swapped: tuple[Line, ...]
    kept: tuple[Line, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {sum(line.count for line in self.swapped)} swapped"]
        for title, group in (("swapped", self.swapped), ("not swapped", self.kept)):
            if group:
                lines.append(title)
                lines += [f"  {line.count:4} {line.class_name:<24} {line.part:<11} {line.what}" for line in group]
        return "\n".join(lines)


@dataclass
class Tally:
    """Counts modules while a model is walked through."""

    swapped: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)

    def report(self, model: str) -> Report:
        groups = ([Line(*key, count) for key, count in counter.items()] for counter in (self.swapped, self.kept))
        return Report(model, *(tuple(group) for group in groups))
