"""How long it takes to start: to import, and from `megakern train` to the first step that is done.

    python -m benchmarks.bench_startup [--seconds N] [--quick] [--json FILE]

The runs train on made-up text: one process of a tiny model, and two of the demo's. What the imports take is listed.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.common import begin_part, end_part, part_parser

GOAL = 5.0  # seconds from `megakern train` to the end of the first step
ROOT = Path(__file__).resolve().parent.parent


def commands(data: Path) -> dict[str, tuple[list[str], float | None]]:
    """What is started: its words, and the goal. A run is over when metrics.jsonl has its first line."""
    python = [sys.executable]
    train = [*python, "-m", "megakern", "train", str(data / "config.toml"), "--train.steps", "1", "--out", "RUN"]
    tiny = [*train, "--model.preset", "tiny-gpt2", "--model.vocab_size", "512"]
    demo = [*train, "--model.preset", "demo", "--parallel.tp", "2", "--nproc", "2"]
    return {
        "import torch": ([*python, "-c", "import torch"], None),
        "import all of a training run": ([*python, "-c", "import megakern.train.worker"], None),
        "megakern --version": ([*python, "-m", "megakern", "--version"], None),
        "megakern train, tiny-gpt2, 1 process": (tiny, GOAL),
        "megakern train, demo, 2 processes": (demo, GOAL),
    }


def prepared(folder: Path) -> Path:
    """A data folder of made-up words, and a config.toml that names it."""
    from megakern.data.prepare import prepare

    words = (f"word{(7 * i) % 1013} " for i in range(5000))
    (folder / "text.txt").write_text("".join(words))
    (folder / "more.txt").write_text("another document, so that one can be held out " * 50)
    prepare([folder / "text.txt", folder / "more.txt"], folder / "data", tokenizer="bytes", validation_fraction=0.1)
    (folder / "config.toml").write_text(f'[data]\npath = "{folder / "data"}"\n')
    return folder


def seconds_to_first_step(words: list[str], folder: Path, number: int) -> float:
    """Start the command; until its first line of metrics is there, or where it trains nothing until its end."""
    run = folder / f"run-{number}"
    words = [str(run) if word == "RUN" else word for word in words]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    trains, metrics = str(run) in words, run / "metrics.jsonl"
    with (folder / "log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths})
        while process.poll() is None and not (trains and metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        done = trains and metrics.exists() and '"kind": "train"' in metrics.read_text()
        if done:
            process.kill()  # the evaluation and the checkpoint after the last step are not of interest; workers end too
        code = process.wait()
    if not done and (trains or code):
        raise RuntimeError(f"{' '.join(words)} ended with code {code}: {(folder / 'log').read_text()[-2000:]}")
    return seconds


def slow_imports(count: int = 12) -> list[dict[str, Any]]:
    """The modules whose own part of the imports is the largest, by `python -X importtime`."""
    words = [sys.executable, "-X", "importtime", "-c", "import megakern.train.worker"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", said, re.M)
    ordered = sorted(((int(us) / 1e3, module) for us, module in found), reverse=True)
    return [{"module": module, "ms": ms} for ms, module in ordered[:count]]


def measure(deadline: float, most: int) -> dict[str, Any]:
    """Results as startup.json keeps them: up to `most` rounds, after one that warms the disk's cache; where one round
    is all, importing warms it."""
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        chosen = commands(folder)
        turns: dict[str, list[float]] = {what: [] for what in chosen}
        for number in range(most + 1):
            if number > 1 and time.monotonic() > deadline:
                break
            for index, (what, (words, _)) in enumerate(chosen.items()):
                if number == 0 and most == 1 and words[1] != "-c":
                    continue
                took = seconds_to_first_step(words, folder, number * len(chosen) + index)
                if number:
                    turns[what].append(took)
    rows = [
        {"what": what, "seconds": statistics.median(turns[what]), "fastest": min(turns[what]),
         "slowest": max(turns[what]), "turns": len(turns[what]), "goal": goal}
        for what, (_, goal) in chosen.items()
    ]  # fmt: skip
    return {"rows": rows, "imports": slow_imports()}


def main(arguments: list[str] | None = None) -> int:
    parser = part_parser(__doc__, seconds=40.0, until="no round begins after that", quick="one round")
    options = begin_part(parser, arguments)
    end_part(options, measure(options.deadline, 1 if options.quick else 5), report.startup_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
