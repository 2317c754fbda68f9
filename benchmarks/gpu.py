"""All that a GPU can say of this project, by one command: builds, runs the GPU tests and every benchmark, writes JSON.

    python3 -m benchmarks.gpu --out DIR [--only tests|bench|tune] [--ops norm,attention] [--backend triton] [--budget N]

Uses the Python that runs it, with torch and triton; installs nothing. What no longer fits into --budget seconds is left
out and named. DIR gets the logs, tests.json, and for each op the figures as benchmarks/results/ keeps them. The
benchmarks are those of `megakern bench` (suite.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import gpu_tests, suite, tune
from benchmarks.common import describe_machine, machine_facts
from megakern.kernels.cuda import toolkit

ROOT = gpu_tests.ROOT
SHARE_OF_TESTS = 0.5  # of the budget, at most, when benchmarks are to follow


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    deadline = started + options.budget
    facts = {**machine_facts(), **({"commit": options.commit} if options.commit else {})}
    print(describe_machine(facts), flush=True)
    failed = False
    if options.only not in ("bench", "tune"):
        until = deadline if options.only == "tests" else started + SHARE_OF_TESTS * options.budget
        failed = not _tests(options, facts, until)
    if options.only != "tests":
        if failed_build := _finish(_build(options), deadline):
            print(failed_build)
        if options.only == "tune":
            failed |= not tune.run(options.ops or tune.NAMES, options.out, deadline)
        else:
            failed |= not suite.run(_suite(options, facts, deadline - time.monotonic()))
    print(f"\n{time.monotonic() - started:.0f} s; everything is in {options.out}")
    return 1 if failed else 0


def _suite(options: argparse.Namespace, facts: dict, seconds: float) -> suite.Suite:
    return suite.Suite(
        out=options.out,
        only=options.ops or (),
        kind="tiny" if options.tiny else "cuda",
        budget=seconds,
        backend=options.backend,
        compile=not options.no_compile,
        facts=facts,
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for results and logs")
    parser.add_argument("--only", choices=("tests", "bench", "tune"), help="one half of it; or the tables (tune.py)")
    ops = f"of {','.join(suite.NAMES)}; benchmarks and tests, of tune {','.join(tune.NAMES)}"
    parser.add_argument("--ops", type=lambda text: tuple(text.split(",")), help=ops)
    parser.add_argument("--backend", choices=("triton", "cuda"), help="this one alone")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile among the peers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU too: does the suite itself work?")
    options = parser.parse_args(arguments)
    known = tune.NAMES if options.only == "tune" else suite.NAMES
    if unknown := set(options.ops or ()) - set(known):
        parser.error(f"--ops: {', '.join(sorted(unknown))}: no such op; the ops are {', '.join(known)}")
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


def _test_files(ops: tuple[str, ...] | None) -> list[str]:
    kernels = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    others = sorted((ROOT / "tests").glob("test_gpu*.py"))
    chosen = [path for path in kernels if ops is None or any(path.stem.startswith(f"test_{op}") for op in ops)]
    return [str(path.relative_to(ROOT)) for path in [*chosen, *(others if ops is None else [])]]


if __name__ == "__main__":
    sys.exit(main())
