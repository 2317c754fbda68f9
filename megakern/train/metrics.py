"""What a run writes while it trains: every step as a line of JSON, and one live line, or plain lines when piped."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from pathlib import Path

from megakern.data.progress import duration
from megakern.train.files import write_atomic


def quantity(value: float, unit: str) -> str:
    """4.2e11 -> "420 G" + unit."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # what is rounded to 1000 of a prefix is 1 of the next
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


class MetricsFile:
    """metrics.jsonl of a run: one object a line, `kind` is "train" or "eval"."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] < first_step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, **record: object) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file; none if it is not there. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class ProgressLine:
    """One line that is written over on a terminal; a plain line every `every` steps when piped.

    Loss, rate and MFU are means over the last `every` steps: those of a single small batch jump too much to be read.
    """

    def __init__(self, steps: int, every: int, stream=None) -> None:
        self.steps, self.every = steps, every
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._recent: deque[tuple[float, float]] = deque(maxlen=every)  # loss and seconds for each token

    def update(self, step: int, *, loss: float, rate: float, mfu: float, left: float) -> None:
        """`step` counts finished steps; rate in tokens/s; mfu as a fraction; left in seconds."""
        self._recent.append((loss, 1 / rate))
        if not self._live and step % self.every and step != self.steps:
            return
        losses = [each for each, _ in self._recent if math.isfinite(each)]
        mean = sum(losses) / len(losses) if losses else loss
        mean_rate = len(self._recent) / sum(seconds for _, seconds in self._recent)
        broken = len(self._recent) - len(losses)
        text = (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {mean:.4f}  {mean_rate:,.0f} tokens/s"
            f"  MFU {mfu * mean_rate / rate:.1%}  {duration(left)} left"
        ) + (f"  ({broken} of {len(self._recent)} steps not finite)" if broken else "")
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, above the live line."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()

    def end(self) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
