"""What every benchmark shares: the flags, the timing, the table, the machine's name, and how results are written.

    python -m benchmarks.bench_norm [--backend torch] [--dtype bf16] [--backward] [--shape 4096x1024 ...] [--json FILE]

All contestants run in this process on the same random data and take turns, so that a drift of the machine's speed meets
all of them; the median of the rounds counts. Before timing, each peer's result is compared with ours. `% of limit`
divides by this machine's copy or matmul rate, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megakern.train import machine
from megakern.train.metrics import quantity

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Case:
    """One shape: the same call for each contestant ("megakern" first), and the work that it cannot avoid."""

    shape: str
    contestants: dict[str, Callable[..., Any]]
    inputs: tuple[torch.Tensor, ...]
    work: float
    """Bytes or FLOPs of one forward pass."""
    unit: str
    """"B" or "FLOP"."""
    backward_work: float
    """The same for the backward pass."""
    comparable: bool = True
    """False where results differ by design, as random masks do: then only shapes are compared."""


def options_for(op: str, shapes: list[str]) -> argparse.Namespace:
    """Parse the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=f"Time {op} beside its peers on this machine.")
    parser.add_argument("--backend", help="backend of megakern's op (default: its own choice)")
    parser.add_argument("--dtype", choices=sorted(machine.DTYPES), default="fp32")
    parser.add_argument("--backward", action="store_true", help="time the backward pass instead of the forward pass")
    parser.add_argument("--shape", nargs="+", default=shapes, help=f"default: {' '.join(shapes)}")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    options.torch_dtype = machine.DTYPES[options.dtype]
    options.device = torch.device(machine.device_type())
    options.rows = []
    machine.keep_freed_memory()  # for all contestants alike: else page faults are timed
    return options


def draw(options: argparse.Namespace, *shape: int) -> torch.Tensor:
    """A random tensor of the benchmark's dtype that wants a gradient."""
    return torch.randn(*shape, device=options.device).to(options.torch_dtype).requires_grad_(options.backward)


def sizes(shape: str) -> list[int]:
    """ "4096x1024" -> [4096, 1024]."""
    return [int(part) for part in shape.split("x")]


def run(op: str, options: argparse.Namespace, cases: Iterable[Case]) -> None:
    """Check, time and print every case; write JSON when asked."""
    print(describe_machine())
    limits = {"B": copy_rate(options.device), "FLOP": machine.matmul_rate(options.torch_dtype, options.device, 0.5)}
    print(f"limits: copy {quantity(limits['B'], 'B/s')}, {options.dtype} matmul {quantity(limits['FLOP'], 'FLOP/s')}")
    print(f"{op}, {options.dtype}, {'backward' if options.backward else 'forward'}\n")
    print(f"{'shape':<22}{'contestant':<14}{'us':>10}{'rate':>14}{'% of limit':>12}{'x megakern':>12}")
    rows = options.rows
    for case in cases:
        calls = {name: _call(function, case.inputs, options) for name, function in case.contestants.items()}
        _compare(case, calls, options)
        seconds = _time_in_turns(calls, options)
        ours = seconds["megakern"]
        work = case.backward_work if options.backward else case.work
        for name, times in seconds.items():
            median = statistics.median(times)
            rate = work / median
            row = {
                "op": op,
                "shape": case.shape,
                "dtype": options.dtype,
                "backward": options.backward,
                "contestant": name,
                "us": median * 1e6,
                "fastest_us": min(times) * 1e6,
                "slowest_us": max(times) * 1e6,
                "rate": rate,
                "unit": f"{case.unit}/s",
                "share_of_limit": rate / limits[case.unit],
                "speed_against_megakern": statistics.median(a / b for a, b in zip(ours, times, strict=True)),
            }
            rows.append(row)
            print(
                f"{case.shape:<22}{name:<14}{row['us']:>10.1f}{quantity(rate, case.unit + '/s'):>14}"
                f"{row['share_of_limit']:>12.1%}{row['speed_against_megakern']:>12.2f}"
            )
    if options.json:
        write_results(options.json, {"limits": limits, "rows": rows})


def _call(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], options) -> Callable[[], Any]:
    """One timed call: forward, or only the backward of a forward made here."""
    if not options.backward:
        return lambda: function(*inputs)
    out = function(*inputs)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    upstream = [torch.ones_like(o) for o in outputs]
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def _compare(case: Case, calls: dict[str, Callable[[], Any]], options) -> None:
    # Once each: an optimizer's step changes its state.
    results = {name: _tensors(call()) for name, call in calls.items()}
    for name, result in results.items():
        for mine, theirs in zip(results["megakern"], result, strict=True):
            if mine.shape != theirs.shape:
                sys.exit(f"{case.shape}: {name} gives {tuple(theirs.shape)}, megakern {tuple(mine.shape)}")
            if not case.comparable:
                continue
            scale = theirs.float().abs().max().clamp_min(1e-6)
            error = ((mine.float() - theirs.float()).abs().max() / scale).item()
            if not error <= TOLERANCE[options.torch_dtype]:
                sys.exit(
                    f"{case.shape}: megakern and {name} differ by {error:.2e} of the largest value; nothing was timed"
                )


def _tensors(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _time_in_turns(calls: dict[str, Callable[[], Any]], options) -> dict[str, list[float]]:
    once = max(_seconds(call, 1, options) for call in calls.values())
    repeats = max(1, int(0.02 / max(once, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats, options) / repeats)
    return seconds


def _seconds(call: Callable[[], Any], repeats: int, options) -> float:
    synchronize = torch.cuda.synchronize if options.device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return time.perf_counter() - start


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MB (64 MB on a CPU), best of ten."""
    n = (256 if device.type == "cuda" else 64) << 20
    source, target = (torch.ones(n // 4, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n / best


def machine_facts() -> dict[str, Any]:
    """Names and versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": machine.cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def describe_machine() -> str:
    return ", ".join(f"{name} {value}" for name, value in machine_facts().items() if value is not None)


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine_facts(), **results}, indent=1) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    try:
        out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
