"""All that a GPU can say of this project, by one command: builds, runs the GPU tests and every benchmark, writes JSON.

    python3 -m benchmarks.gpu --out DIR [--only tests|bench] [--ops norm,attention] [--backend triton] [--budget 520]

Uses the Python that runs it, with torch and triton; installs nothing. What no longer fits into --budget seconds is left
out and named. DIR gets the logs, tests.json, and for each op the figures as benchmarks/results/ keeps them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import megakern as mk
from benchmarks import gpu_tests
from benchmarks.common import Options, describe_machine, machine_facts, run_benchmark
from megakern.kernels.cuda import toolkit
from megakern.train.metrics import quantity

ROOT = gpu_tests.ROOT
# In this order, until time is up.
OPS = (
    "norm",
    "attention",
    "linear",
    "cross_entropy",
    "adamw",
    "linear_cross_entropy",
    "activation",
    "rope",
    "grad_norm",
    "dropout",
)
DTYPES = {"adamw": "fp32", "grad_norm": "fp32"}  # others: bf16
SHARE_OF_TESTS = 0.5  # of the budget, at most, when benchmarks are to follow


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    deadline = started + options.budget
    facts = {**machine_facts(), **({"commit": options.commit} if options.commit else {})}
    print(describe_machine(facts), flush=True)
    failed = False
    if options.only != "bench":
        until = deadline if options.only == "tests" else started + SHARE_OF_TESTS * options.budget
        failed = not _tests(options, facts, until)
    if options.only != "tests":
        if failed_build := _finish(_build(options), deadline):
            print(failed_build)
        rows = _benchmarks(options, facts, deadline)
        if not options.ops and not options.tiny:
            print(_training(options, deadline))
        print(f"\n{table(rows)}")
        if options.tune:
            print(f"\n{tuned(options.out)}")
        failed |= any("error" in row for row in rows)
    print(f"\n{time.monotonic() - started:.0f} s; everything is in {options.out}")
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for results and logs")
    parser.add_argument("--only", choices=("tests", "bench"), help="one half of it")
    parser.add_argument("--ops", type=lambda text: text.split(","), help=f"of {','.join(OPS)}; benchmarks and tests")
    parser.add_argument("--backend", choices=("triton", "cuda"), help="this one alone")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument("--tune", action="store_true", help="mk.autotune(True): time all configurations of the table")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile among the peers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU too: does the suite itself work?")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops or ()) - set(OPS):
        parser.error(f"--ops: {', '.join(sorted(unknown))}: no such op; the ops are {', '.join(OPS)}")
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no NVIDIA GPU here; --tiny runs the suite without one")
    return options


# --- building ---


def _build(options: argparse.Namespace) -> subprocess.Popen | None:
    """The CUDA module, in the background; None where there is nothing to build."""
    if not (ROOT / "csrc" / "bindings.cpp").exists() or options.backend == "triton" or not torch.cuda.is_available():
        return None
    log = (options.out / "build.log").open("w")
    arch = toolkit.arch_of(torch.cuda.get_device_capability())
    environment = {toolkit.VARIABLE: arch, **os.environ}  # for this GPU alone, a third of the time
    words = [sys.executable, "csrc/build.py", "cuda"]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _finish(build: subprocess.Popen | None, deadline: float) -> str | None:
    """Waits for a build; what went wrong, or None."""
    if build is None:
        return None
    try:
        code = build.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        build.kill()
        return "build of the CUDA module: not done in time; see build.log"
    if code or not list((ROOT / "megakern").glob("_C.*")):
        return f"build of the CUDA module FAILED (exit code {code}); see build.log"
    return None


# --- tests ---


def _tests(options: argparse.Namespace, facts: dict, deadline: float) -> bool:
    """Triton's tests while the CUDA module is built, then that module's."""
    build = _build(options)
    paths = _test_files(options.ops)
    outcomes = {}
    if options.backend != "cuda":
        outcomes["triton"] = gpu_tests.run_tests(
            paths, options.out, "tests-triton", deadline, ["--kernel-backend", "triton"]
        )
    complaint = _finish(build, deadline)
    if options.backend == "cuda" or (build and not complaint):
        kernels = [path for path in paths if "kernels" in path]
        outcomes["cuda"] = gpu_tests.run_tests(
            kernels, options.out, "tests-cuda", deadline, ["--kernel-backend", "cuda"]
        )
    for name, outcome in outcomes.items():
        print(
            f"\ntests, {name}: {outcome.passed} passed, {len(outcome.failures)} failed, {outcome.skipped} skipped in "
            f"{outcome.seconds:.0f} s{'; NOT ALL RAN' if outcome.unfinished else ''}"
        )
        for test, line in list(outcome.failures.items())[:40]:
            print(f"  {test.removeprefix('tests/')}: {line[:160]}")
    if complaint:
        print(complaint)
    results = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    (options.out / "tests.json").write_text(json.dumps({"machine": facts, "tests": results}, indent=1) + "\n")
    return not complaint and not any(outcome.failures or outcome.unfinished for outcome in outcomes.values())


def _test_files(ops: list[str] | None) -> list[str]:
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    others = sorted((ROOT / "tests").glob("test_gpu*.py"))
    chosen = [path for path in kernels if ops is None or any(path.stem.startswith(f"test_{op}") for op in ops)]
    return [str(path.relative_to(ROOT)) for path in [*chosen, *(others if ops is None else [])]]


# --- benchmarks ---


def _benchmarks(options: argparse.Namespace, facts: dict, deadline: float) -> list[dict]:
    """One op after another in a process of its own, which is replaced when an op breaks it."""
    clocks = _Clocks(options.out)
    worker = _Worker(options, deadline)
    everything = []
    for op in OPS:
        if options.ops and op not in options.ops:
            continue
        if time.monotonic() > deadline - 5:
            print(f"{op}: LEFT OUT, no time left")
            continue
        started, first = time.monotonic(), clocks.count()
        if worker.broken:
            worker = _Worker(options, deadline)
        limits, rows, remarks = worker.run(op, deadline)
        everything += rows
        results = {"machine": facts, "limits": limits, "clocks": clocks.since(first), "rows": rows}
        (options.out / f"{op}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{op}: {len(rows)} figures in {time.monotonic() - started:.0f} s{remarks}", flush=True)
    worker.close()
    clocks.close()
    return everything


def _training(options: argparse.Namespace, deadline: float) -> str:
    """Whole training steps; each contestant is a process of its own, so they come after all the others."""
    log = options.out / "train.log"
    words = [sys.executable, "-m", "benchmarks.bench_train", "--rounds", "3", "--json", str(options.out / "train.json")]
    with log.open("w") as out:
        try:
            subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=True,
                           timeout=max(1.0, deadline - time.monotonic()))  # fmt: skip
        except subprocess.TimeoutExpired:
            return "training step: LEFT OUT, no time left"
        except subprocess.CalledProcessError as error:
            return f"training step: FAILED with exit code {error.returncode}, see train.log"
    return "\n" + log.read_text()


class _Worker:
    """The process that benchmarks run in; its output goes to bench.log."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = {
            "log": options.out / "bench.log",
            "kind": "tiny" if options.tiny else "cuda",
            "backend": options.backend,
            "compile": not options.no_compile and not options.tiny,
            "tune": options.out if options.tune else None,
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


def _serve(pipe, settings: dict) -> None:
    """In the worker: runs the ops that come through the pipe, and sends every figure at once."""
    log = settings["log"].open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    deadline = time.monotonic() + settings["seconds"]
    if settings["tune"]:
        os.environ["XDG_CACHE_HOME"] = str(settings["tune"])
        mk.autotune(True)
    while True:
        try:
            op = pipe.recv()
        except EOFError:
            return
        try:
            module = importlib.import_module(f"benchmarks.bench_{op}")
            options = Options(
                shape=module.SHAPES[settings["kind"]],
                backend=settings["backend"],
                dtype=DTYPES.get(op, "bf16"),
                passes=("forward", "backward"),
                rounds=1,
                compile=settings["compile"],
                deadline=deadline,
                rows=_Sent(pipe),
            )
            pipe.send(("limits", options.limits))
            run_benchmark(module.benchmark, options)
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


class _Clocks:
    """What nvidia-smi reads four times a second while benchmarks run: MHz, watts, degrees."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clocks.csv"
        words = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "250"]
        try:
            with self._file.open("w") as out:
                self._process = subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL)
        except OSError:
            self._process = None

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines()

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


# --- the table ---


def table(rows: list[dict]) -> str:
    """A line for each figure of ours: time, rate, share of the limit, and how many times as fast as the peers."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["backward"]), {})[row["contestant"]] = row
    head = (
        f"{'op':<30}{'shape':<26}{'pass':<5}{'backend':<9}{'us':>9}{'rate':>14}{'limit':>7}{'x peer':>8} "
        f"{'':<13}{'x compile':>9}{'launch':>8}"
    )
    lines, wrong = [head], []
    for (op, shape, backward), found in groups.items():
        for name, row in found.items():
            label = f"{op[:29]:<30}{shape:<26}{'bwd' if backward else 'fwd':<5}"
            if "error" in row:
                wrong.append(f"{label}{name}: {row['error'][:160]}")
            elif name.startswith("megakern"):
                lines.append(f"{label}{row['backend'] or 'auto':<9}{_columns(row, found)}")
    return "\n".join(lines + (["", "not timed:", *wrong] if wrong else []))


def _columns(row: dict, found: dict[str, dict]) -> str:
    times = {name: peer["us"] for name, peer in found.items() if not name.startswith("megakern") and "us" in peer}
    compiled = times.pop("torch.compile", None)
    best = min(times, key=times.get) if times else None
    ratio = f"{times[best] / row['us']:.2f}" if best else "-"
    against_compiled = f"{compiled / row['us']:.2f}" if compiled else "-"
    launch = f"{row['launch_us']:.0f}" if "launch_us" in row else "-"
    return (
        f"{row['us']:>9.1f}{quantity(row['rate'], row['unit']):>14}{row['share_of_limit']:>7.1%}{ratio:>8} "
        f"{best or '':<13}{against_compiled:>9}{launch:>8}"
    )


def tuned(folder: Path) -> str:
    """A line for each class of problems: every configuration's microseconds, the table's choice first."""
    lines = ["tuned, us; the table's choice comes first"]
    for file in sorted((folder / "megakern").glob("*.json")):
        for problem, times in json.loads(file.read_text()).items():
            found = {name: time for name, time in times.items() if name != "of"}
            best = min(found, key=found.get)
            figures = ", ".join(f"{name} {time:.1f}{' BEST' if name == best else ''}" for name, time in found.items())
            lines.append(f"{problem}: {figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
