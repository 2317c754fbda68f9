"""What every benchmark shares: the flags, the turns of the contestants, the table, the machine's name, and the results.

    python -m benchmarks.bench_norm [--backend torch] [--dtype bf16] [--backward] [--shape 4096x1024 ...] [--json FILE]

All contestants run in this process on the same random data and take turns from a cold cache; the median counts. Before
timing, every result is compared with the first peer's, and where it differs with that peer's in fp32. One that is wrong
or raises is reported and not timed, a peer that is not installed is named. `of limit` divides by this machine's copy or
matmul rate, measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.timing import CpuClock, CudaClock, Times
from megakern.ops.dispatch import PREFERENCE, UNAVAILABLE, ops_of
from megakern.train import machine
from megakern.train.metrics import quantity

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Case:
    """One shape: the same call for each contestant (ours first), and the work that it cannot avoid."""

    shape: str
    contestants: dict[str, Callable[..., Any] | str]
    """A text instead of a call is the reason why a peer is not here."""
    inputs: tuple[torch.Tensor, ...]
    work: float | None
    """Bytes or FLOPs of one forward pass; None where there is none to time."""
    unit: str
    """"B" or "FLOP"."""
    backward_work: float | None
    """The same for the backward pass; None where there is none to time."""
    comparable: bool = True
    """False where results differ by design, as random masks do: then only shapes are compared."""


@dataclass
class Options:
    """What is timed, and where."""

    shape: list[str]
    backend: str | None = None
    dtype: str = "fp32"
    passes: tuple[str, ...] = ("forward",)
    rounds: int = 9
    patience: float = 0.3
    """On a CPU: seconds of turns of the slowest contestant, where that is more than `rounds`."""
    compile: bool = False
    """Also time torch.compile of the peer named "torch" or "cuBLAS"."""
    device: torch.device = field(default_factory=lambda: torch.device(machine.device_type()))
    deadline: float = float("inf")
    """On time.monotonic(): cases that begin later are left out, and named."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def torch_dtype(self) -> torch.dtype:
        return machine.DTYPES[self.dtype]

    @functools.cached_property
    def clock(self) -> CpuClock | CudaClock:
        return CudaClock() if self.device.type == "cuda" else CpuClock(self.rounds, self.patience)

    @property
    def limits(self) -> dict[str, float]:
        if self.torch_dtype not in _limits:
            _limits[self.torch_dtype] = self.clock.limits(self.torch_dtype)
        return _limits[self.torch_dtype]


_limits: dict[torch.dtype, dict[str, float]] = {}  # measured once a process


Shapes = dict[str, list[str]]
"""Shapes by kind of machine: "cpu", "cuda", and "tiny" to see that a benchmark runs at all."""


def main(op: str, benchmark: Callable[[Options], None], shapes: Shapes) -> None:
    """The command line of one benchmark: parse the flags that all share, run it, write JSON when asked."""
    device = machine.device_type()
    parser = argparse.ArgumentParser(description=f"Time {op} beside its peers on this machine.")
    parser.add_argument("--backend", help="backend of megakern's op (default: its own choice; on a GPU all)")
    parser.add_argument("--dtype", choices=sorted(machine.DTYPES), default="fp32" if device == "cpu" else "bf16")
    parser.add_argument("--backward", action="store_true", help="time the backward pass instead of the forward pass")
    parser.add_argument("--shape", nargs="+", default=shapes[device], help=f"default: {' '.join(shapes[device])}")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant, on a CPU")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the plain PyTorch too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = vars(parser.parse_args())
    file, backward = given.pop("json"), given.pop("backward")
    options = Options(**given, passes=("backward",) if backward else ("forward",))
    print(describe_machine())
    run_benchmark(benchmark, options)
    if file:
        write_results(file, {"limits": options.limits, "rows": options.rows})
    sys.exit(1 if report.failures(options.rows) else 0)


# --- the command line of a part: python -m benchmarks.bench_<part> ---


def part_parser(doc: str, *, seconds: float, until: str, quick: str) -> argparse.ArgumentParser:
    """With the flags that all parts have; `until` says what the time limit does, `quick` how a quick run differs."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=seconds, help=until)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def begin_part(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with `deadline` on time.monotonic(), when the machine's facts are printed."""
    started = time.monotonic()
    options = parser.parse_args(arguments)
    options.deadline = started + options.seconds
    print(describe_machine(), flush=True)
    return options


def end_part(options: argparse.Namespace, results: dict[str, Any], table: Callable[[dict], str]) -> None:
    print(f"\n{table(results)}", flush=True)
    if options.json:
        write_results(options.json, results)


# --- ops ---


def run_benchmark(benchmark: Callable[[Options], None], options: Options) -> None:
    machine.keep_freed_memory()  # for all contestants alike: else page faults are timed
    limits = ", ".join(f"{name} {quantity(rate, 'FLOP/s' if name == 'FLOP' else 'B/s')}"
                       for name, rate in options.limits.items())  # fmt: skip
    print(f"limits: {limits} ({options.dtype})")
    benchmark(options)


def draw(options: Options, *shape: int) -> torch.Tensor:
    """A random tensor of the benchmark's dtype that wants a gradient if the backward pass is timed."""
    x = torch.randn(*shape, device=options.device, dtype=options.torch_dtype)
    return x.requires_grad_("backward" in options.passes)


def sizes(shape: str) -> list[int]:
    """ "4096x1024" -> [4096, 1024]."""
    return [int(part) for part in shape.split("x")]


def ours(options: Options, op: str, call: Callable[..., Any]) -> dict[str, functools.partial]:
    """As "megakern" `call(..., backend=)` on the backend asked for, or on megakern's own choice. On a GPU, if none was
    asked for, also "megakern NAME" for each slower compiled backend; none at all where no compiled backend has the op.
    """
    if options.device.type != "cuda" or options.backend is not None:
        return {"megakern": functools.partial(call, backend=options.backend)}
    able = [b for b in PREFERENCE["cuda"] if b != "torch" and UNAVAILABLE[b] is None and op in ops_of(b)]
    return {f"megakern {b}" if b in able[1:] else "megakern": functools.partial(call, backend=b) for b in able}


def run(op: str, options: Options, cases: Iterable[Case]) -> None:
    """Check and time every case, each pass of it; print the table of this op."""
    first = len(options.rows)
    for case in cases:
        if time.monotonic() > options.deadline:
            options.left_out.append(f"{op} {case.shape}")
        else:
            _run_case(op, options, case)
        case = None  # its tensors must be gone before the next case makes its own
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{report.op_table(options.rows[first:])}", flush=True)


def _run_case(op: str, options: Options, case: Case) -> None:
    functions = {name: function for name, function in case.contestants.items() if not isinstance(function, str)}
    missing = {name: reason for name, reason in case.contestants.items() if isinstance(reason, str)}
    plain = next((functions[name] for name in ("torch", "cuBLAS") if name in functions), None)
    if options.compile and plain is not None:
        torch._functorch.config.donated_buffer = False  # else a backward pass runs only once
        torch._dynamo.reset()
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
    for which in options.passes:
        work = case.work if which == "forward" else case.backward_work
        if work is None:
            continue
        label = {"op": op, "shape": case.shape, "dtype": options.dtype, "backward": which == "backward"}
        calls, errors = _checked(case, functions, which, options)
        options.rows += [{**label, "contestant": name, "missing": reason} for name, reason in missing.items()]
        options.rows += [{**label, "contestant": name, "error": error} for name, error in errors.items()]
        memory = {name: options.clock.peak_bytes(call) for name, call in calls.items()}
        times = options.clock.take_turns(calls) if calls else {}
        for name, time_of in times.items():
            # The backend of ours that was asked for; None for peers and for megakern's own choice.
            backend = getattr(functions[name], "keywords", {}).get("backend")
            figures = _figures(time_of, times, work, case.unit, options)
            row = {**label, "contestant": name, "backend": backend, **figures, "peak_bytes": memory[name]}
            options.rows.append(row)


def _figures(own: Times, times: dict[str, Times], work: float, unit: str, options: Options) -> dict[str, Any]:
    rate = work / own.median
    against = None
    if "megakern" in times:
        pairs = zip(times["megakern"].seconds, own.seconds, strict=True)
        against = statistics.median(a / b for a, b in pairs)
    figures = {
        "us": own.median * 1e6,
        "fastest_us": min(own.seconds) * 1e6,
        "slowest_us": max(own.seconds) * 1e6,
        "rate": rate,
        "unit": f"{unit}/s",
        "share_of_limit": rate / options.limits[unit],
        "speed_against_megakern": against,
    }
    return figures if own.launch is None else {**figures, "launch_us": own.launch * 1e6}


def _checked(case: Case, functions, which: str, options: Options) -> tuple[dict[str, Callable], dict[str, str]]:
    """The calls whose results are those of the first peer, and what is wrong with the others."""
    calls, errors = {}, {}
    peers = [name for name in functions if not name.startswith("megakern")]
    reference = None
    for name in [*peers, *(name for name in functions if name not in peers)]:
        try:
            calls[name] = _call(functions[name], case.inputs, which, options.torch_dtype)
            result = _tensors(calls[name]())  # once: an optimizer's step changes its state
            _synchronize(options)
        except Exception as error:  # noqa: BLE001 - whatever one contestant raises, the others are timed
            _synchronize(options)  # raises again when the GPU itself is in a state of error
            calls.pop(name, None)
            errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        if reference is None:
            reference = (name, result)
            continue
        wrong = _difference(result, *reference, case.comparable, options)
        if wrong and not _agrees_in_fp32(result, functions[reference[0]], case.inputs, which, options):
            del calls[name]
            errors[name] = wrong
    return {name: calls[name] for name in functions if name in calls}, errors


def _agrees_in_fp32(result, peer: Callable[..., Any], inputs, which: str, options: Options) -> bool:
    """Is it the peer that rounds? PyTorch's layer norm on CPUs gives bf16 weight gradients that are 8 to 14 % off."""
    if options.torch_dtype == torch.float32:
        return False
    exact = tuple(
        x.detach().float().requires_grad_(x.requires_grad) if x.dtype == options.torch_dtype else x for x in inputs
    )
    try:
        expected = _tensors(_call(peer, exact, which, options.torch_dtype)())
    except RuntimeError:  # a peer with narrow tensors of its own, beside the inputs
        return False
    return _difference(result, "", expected, True, options) is None


def _call(function: Callable[..., Any], inputs, which: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One timed call: forward, or only the backward of a forward made here, of values that `dtype` has."""
    if which == "forward":
        return lambda: function(*inputs)
    out = function(*inputs)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    drawn = (torch.randn(o.shape, generator=generator, device=o.device) for o in outputs)
    upstream = [x.to(dtype).to(o.dtype) for x, o in zip(drawn, outputs, strict=True)]
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def _difference(result, peer: str, reference, comparable: bool, options: Options) -> str | None:
    for mine, theirs in zip(result, reference, strict=True):
        if mine.shape != theirs.shape:
            return f"gives {tuple(mine.shape)}, {peer} {tuple(theirs.shape)}"
        if not comparable or mine.numel() == 0:
            continue
        scale = theirs.abs().max().float().clamp_min(1e-6)
        error = ((mine - theirs).abs().max() / scale).item()
        if not error <= TOLERANCE[options.torch_dtype]:
            return f"differs from {peer} by {error:.2e} of the largest value"
    return None


def _tensors(out: Any) -> list[torch.Tensor]:
    return [o.detach() for o in (out if isinstance(out, (tuple, list)) else [out])]


def _synchronize(options: Options) -> None:
    if options.device.type == "cuda":
        torch.cuda.synchronize()


def machine_facts() -> dict[str, Any]:
    """Names and versions that a figure depends on."""
    facts = {
        "cpu": _cpu_name(),
        "cores": machine.cores(),
        "isa": _instruction_set(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if facts["gpu"] is None:
        return facts
    import triton

    return {**facts, "triton": triton.__version__, "cuda": torch.version.cuda, "driver": nvidia_smi("driver_version")}


def nvidia_smi(fields: str) -> str | None:
    """The first GPU's `fields`, as nvidia-smi prints them; None where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.strip().splitlines()[0] if out.strip() else None


def describe_machine(facts: dict[str, Any] | None = None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or machine_facts()).items() if value is not None)


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


def _instruction_set() -> str | None:
    """The best that this processor has for matrix products, as /proc/cpuinfo names it: models go by few names."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return None
    return next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), None)


def _commit() -> str:
    """Of the checkout that this file is in; an installed copy may lie in somebody else's."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()
