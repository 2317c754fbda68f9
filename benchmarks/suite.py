"""`megakern bench`: every op and the whole training step beside their peers on this machine, in tables and JSON files.

Ops run one after another in a process of their own, which is replaced when an op breaks it; each other part is a
process (`python -m benchmarks.bench_<part>`). What no longer fits into the budget is left out and named. --out gets a
JSON file a part, as benchmarks/results/<machine>/ keeps them; tables.py and plots.py make tables and pictures of those.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import megakern as mk
from benchmarks import report
from benchmarks.common import Options, describe_machine, machine_facts, run_benchmark

# In this order, until time is up.
OPS = (
    "norm",
    "attention",
    "linear",
    "mlp",
    "cross_entropy",
    "adamw",
    "linear_cross_entropy",
    "activation",
    "rope",
    "paged_attention",
    "grad_norm",
    "dropout",
)
FP32 = ("adamw", "grad_norm")  # ops that are timed in fp32, whatever the others are timed in
# Part -> its share of the budget. What a part leaves goes to those after it.
PARTS = {
    "cpu": {"train": 0.41, "ops": 0.1, "generate": 0.07, "startup": 0.04, "curves": 0.09, "scaling": 0.13,
            "growth": 0.05, "patch": 0.11},
    "cuda": {"ops": 0.45, "train": 0.35, "generate": 0.05, "growth": 0.05, "patch": 0.1},
    "tiny": {"ops": 1.0},
}  # fmt: skip
WORDS = {"cpu": {"patch": ["--workload", "a small Llama"]}}  # of a part's command: the other one takes 90 s more
# Training and generation end when they shall; the others take on two cores of a Xeon with AMX, idle, 17 s (ops), 7
# (growth), 17 (startup) and 28 (scaling).
QUICK = {"train": 0.3, "ops": 0.13, "growth": 0.06, "generate": 0.18, "startup": 0.13, "scaling": 0.2}
NAMES = (*OPS, *PARTS["cpu"])
QUICK_SECONDS, FULL_SECONDS = 150.0, 840.0
QUICK_GRACE, GRACE = 30.0, 60.0  # seconds for a part to end what it has begun; then it is ended


@dataclass
class Suite:
    """What is measured, and where the results go."""

    out: Path | None = None
    only: tuple[str, ...] = ()
    """Parts, or ops by name; empty: all."""
    kind: str = "cpu"
    """Shapes: "cpu", "cuda", or "tiny", with which the suite itself is tried."""
    budget: float = FULL_SECONDS
    quick: bool = False
    backend: str | None = None
    compile: bool = True
    tune: Path | None = None
    """mk.autotune(True), with its findings in this folder."""
    facts: dict = field(default_factory=machine_facts)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in NAMES]:
            raise ValueError(f"--only: {', '.join(unknown)}: no such part; the parts are {', '.join(NAMES)}")

    @property
    def grace(self) -> float:
        return QUICK_GRACE if self.quick else GRACE

    @property
    def ops(self) -> tuple[str, ...]:
        named = tuple(op for op in OPS if op in self.only)
        return named or (OPS if not self.only or "ops" in self.only else ())

    @property
    def parts(self) -> dict[str, float]:
        """The parts that are run, with their shares of the budget."""
        shares = QUICK if self.quick else PARTS[self.kind]
        chosen = {part: share for part, share in shares.items() if not self.only or part in self.only}
        for part in self.only:
            if part not in OPS:
                chosen.setdefault(part, 0.1)
        if self.ops:
            chosen.setdefault("ops", 0.5)
        return {part: share / sum(chosen.values()) for part, share in chosen.items()}


def run(suite: Suite) -> bool:
    """Measures, prints every table as it comes, writes the files; False when something of ours failed."""
    started = time.monotonic()
    print(describe_machine(suite.facts), flush=True)
    if suite.out is not None:
        suite.out.mkdir(parents=True, exist_ok=True)
    sound, spent = True, 0.0
    for part, share in suite.parts.items():
        spent += share
        deadline = started + spent * suite.budget
        if time.monotonic() > deadline - 3:
            print(f"\n{part}: LEFT OUT, no time left", flush=True)
        elif part == "ops":
            sound &= not report.failures(run_ops(suite, deadline))
        else:
            sound &= _run_part(part, suite, deadline)
    print(f"\n{time.monotonic() - started:.0f} s" + (f"; figures are in {suite.out}" if suite.out else ""), flush=True)
    return sound


def _run_part(part: str, suite: Suite, deadline: float) -> bool:
    """One of the parts beside the ops, in a process; it keeps to its time itself, and is ended `grace` after it."""
    started = time.monotonic()
    words = [sys.executable, "-m", f"benchmarks.bench_{part}", "--seconds", f"{deadline - time.monotonic():.0f}"]
    words += WORDS.get(suite.kind, {}).get(part, [])
    words += ["--quick"] if suite.quick else []
    words += ["--json", str(suite.out / f"{part}.json")] if suite.out else []
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    print(flush=True)
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)
    try:
        code = process.wait(max(1.0, deadline + suite.grace - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
        if isinstance(reason, KeyboardInterrupt):
            raise
        print(f"{part}: ENDED, no time left", flush=True)
        return True
    took = f"{time.monotonic() - started:.0f} s"
    print(f"{part}: FAILED with exit code {code} after {took}" if code else f"{part}: {took}", flush=True)
    return code == 0


# --- ops ---


def run_ops(suite: Suite, deadline: float) -> list[dict]:
    """Every op in turn; returns all rows."""
    clocks = _Clocks(suite.out)
    worker = _Worker(suite, deadline)
    everything = []
    for op in suite.ops:
        if time.monotonic() > deadline - 3:
            print(f"{op}: LEFT OUT, no time left")
            continue
        started, first = time.monotonic(), clocks.count()
        if worker.broken:
            worker = _Worker(suite, deadline)
        limits, rows, remarks = worker.run(op, deadline)
        everything += rows
        if suite.out is not None:
            results = {"machine": suite.facts, "limits": limits, "clocks": clocks.since(first), "rows": rows}
            (suite.out / f"{op}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{report.op_table(rows)}") if rows else None
        print(f"{op}: {len(rows)} figures in {time.monotonic() - started:.0f} s{remarks}", flush=True)
    worker.close()
    clocks.close()
    return everything


class _Worker:
    """The process that benchmarks of ops run in; what they print goes to bench.log."""

    def __init__(self, suite: Suite, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = {
            "log": Path(os.devnull) if suite.out is None else suite.out / "bench.log",
            "kind": suite.kind,
            "quick": suite.quick,
            "backend": suite.backend,
            "compile": suite.compile and suite.kind == "cuda",
            "tune": suite.tune,
            "seconds": deadline - time.monotonic(),
        }
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        self.broken = False

    def run(self, op: str, deadline: float) -> tuple[dict, list[dict], str]:
        """-> limits, rows, what went wrong in words."""
        self._pipe.send(op)
        limits, rows = {}, []
        while True:
            try:
                if not self._pipe.poll(max(0.1, deadline + 5 - time.monotonic())):
                    self.close()
                    return limits, rows, "; ENDED: no time left"
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionError):
                self.close()
                return limits, rows, f"; its process DIED with code {self._process.exitcode}, see bench.log"
            if kind == "limits":
                limits = value
            elif kind == "row":
                rows.append(value)
            elif kind == "error":
                self.close()
                return limits, rows, f"; FAILED: {value}"
            else:
                return limits, rows, f"; LEFT OUT, no time left: {', '.join(value)}" if value else ""

    def close(self) -> None:
        self.broken = True
        self._pipe.close()
        self._process.kill()
        self._process.join()


def options_of(op: str, settings: dict, rows: list) -> Options:
    """What `op` is timed with: on a CPU in the precision that pays there, of a quick run the first shape."""
    from megakern.train import machine

    module = importlib.import_module(f"benchmarks.bench_{op}")
    shapes = module.SHAPES[settings["kind"]]
    dtype = "bf16"
    if settings["kind"] == "cpu":
        import torch

        dtype, _ = machine.choose_precision(torch.device("cpu"))
    return Options(
        shape=shapes[:1] if settings["quick"] else shapes,
        backend=settings["backend"],
        dtype="fp32" if op in FP32 else dtype,
        passes=("forward", "backward"),
        patience=0.1 if settings["quick"] else 0.3 if settings["kind"] == "cpu" else 0.0,
        rounds={"cpu": 3 if settings["quick"] else 7}.get(settings["kind"], 1),
        compile=settings["compile"],
        deadline=settings["deadline"],
        rows=rows,
    )


def _serve(pipe, settings: dict) -> None:
    """In the worker: runs the ops that come through the pipe, and sends every figure at once."""
    log = settings["log"].open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    settings["deadline"] = time.monotonic() + settings["seconds"]
    if settings["tune"]:
        os.environ["XDG_CACHE_HOME"] = str(settings["tune"])
        mk.autotune(True)
    while True:
        try:
            op = pipe.recv()
        except EOFError:
            return
        try:
            options = options_of(op, settings, _Sent(pipe))
            pipe.send(("limits", options.limits))
            run_benchmark(importlib.import_module(f"benchmarks.bench_{op}").benchmark, options)
            pipe.send(("done", options.left_out))
        except Exception as error:  # noqa: BLE001 - the parent must hear of it, whatever it is
            traceback.print_exc()
            pipe.send(("error", f"{type(error).__name__}: {str(error)[:200]}"))


class _Sent(list):
    """Rows that go through the pipe as they are made."""

    def __init__(self, pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def append(self, row) -> None:
        super().append(row)
        self._pipe.send(("row", row))

    def __iadd__(self, rows):
        for row in rows:
            self.append(row)
        return self


class _Clocks:
    """What nvidia-smi reads four times a second while benchmarks run: MHz, watts, degrees. Nothing without `folder`."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self, folder: Path | None) -> None:
        self._file, self._process = None if folder is None else folder / "clocks.csv", None
        words = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "250"]
        if self._file is None:
            return
        try:
            with self._file.open("w") as out:
                self._process = subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL)
        except OSError:  # there is no nvidia-smi
            self._file.unlink()
            self._file = None

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file else []

    def count(self) -> int:
        return len(self._lines())

    def since(self, first: int) -> dict[str, dict[str, float]]:
        """Field -> lowest, median and highest reading since the line `first`."""
        readings = []
        for line in self._lines()[first:]:
            values = line.split(",")
            try:
                readings.append([float(value) for value in values])
            except ValueError:  # a field that this GPU does not have, or a line not yet whole
                continue
        columns = zip(*(r for r in readings if len(r) == len(self.FIELDS)), strict=True)
        return {
            name: {"lowest": min(column), "median": statistics.median(column), "highest": max(column)}
            for name, column in zip(self.FIELDS, columns, strict=False)
        }

    def close(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
