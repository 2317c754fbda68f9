"""Loss curves of bf16 beside fp32, over several seeds: is what a faster precision learns within what a seed changes?

    python -m benchmarks.bench_curves [--seconds N] [--seeds 5] [--steps 60] [--json FILE]

A small GPT on bytes of Python's standard library. A seed chooses the initial weights and the batches, the same for each
precision. bf16 holds when in every tenth of the run its loss, the mean over seeds, lies between the lowest and the
highest of the fp32 runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

import megakern as mk
from benchmarks import report, steps
from benchmarks.common import begin_part, end_part, part_parser
from megakern.parallel.context import ParallelContext
from megakern.train import build, machine

CONTESTANTS = ("fp32", "bf16", "bf16 split")
MODEL = {"layers": 4, "width": 256, "heads": 4, "vocab_size": 256, "vocab_multiple": 1, "sequence_length": 128}
BATCH = 8
WINDOWS = 10


def text() -> torch.Tensor:
    """Bytes of the standard library's own modules, one after the other in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\0".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def curve(how: str, seed: int, count: int, corpus: torch.Tensor, device: torch.device) -> list[float]:
    """Losses of `count` steps from `seed`."""
    settings = steps.run_config(mk.GPTConfig(**MODEL), how)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, seed=seed))
    model = build.make_model(settings, ParallelContext(), device)
    optimizer = build.make_optimizer(model, settings)
    build.start_masters(model, optimizer, settings)
    step = steps.step_of(model, optimizer)
    generator, T, losses = torch.Generator().manual_seed(seed), MODEL["sequence_length"], []
    for _ in range(count):
        starts = torch.randint(len(corpus) - T - 1, (BATCH,), generator=generator)
        rows = torch.stack([corpus[s : s + T + 1] for s in starts.tolist()]).to(device)
        losses.append(step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return losses


def windows(curves: list[list[float]]) -> list[list[float]]:
    """Window -> each run's mean loss there."""
    count = len(curves[0])
    edges = [count * i // WINDOWS for i in range(WINDOWS + 1)]
    return [[statistics.fmean(run[a:b]) for run in curves] for a, b in itertools.pairwise(edges) if b > a]


def judge(curves: list[list[float]], reference: list[list[float]]) -> str:
    """ "yes", or in how many tenths of the run the mean over seeds leaves the reference's runs."""
    pairs = list(zip(windows(curves), windows(reference), strict=True))
    outside = [not min(theirs) <= statistics.fmean(own) <= max(theirs) for own, theirs in pairs]
    return "yes" if not any(outside) else f"no: outside in {sum(outside)} of {len(outside)} parts"


def measure(seeds: int, count: int, deadline: float) -> dict[str, Any]:
    """Results as curves.json keeps them. A seed that does not begin in time is left out for all."""
    machine.keep_freed_memory()
    device, corpus = torch.device(machine.device_type()), text()
    curves: dict[str, list[list[float]]] = {how: [] for how in CONTESTANTS}
    took = 0.0
    for seed in range(seeds):
        started = time.monotonic()
        if seed and started + took > deadline:
            break
        for how in CONTESTANTS:
            curves[how].append(curve(how, seed, count, corpus, device))
        took = time.monotonic() - started
    rows = []
    for how, runs in curves.items():
        last = windows(runs)[-1]
        rows.append(
            {
                "contestant": f"megakern {how}",
                "mean": statistics.fmean(last),
                "lowest": min(last),
                "highest": max(last),
                "verdict": judge(runs, curves["fp32"]),
                "curves": [[round(loss, 4) for loss in run] for run in runs],
            }
        )
    return {"model": MODEL, "batch": BATCH, "seeds": len(curves["fp32"]), "steps": count, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = part_parser(__doc__, seconds=120.0, until="no seed begins that would not end in time", quick="30 steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = begin_part(parser, arguments)
    count = 30 if options.quick else options.steps
    end_part(options, measure(options.seeds, count, options.deadline), report.curves_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
