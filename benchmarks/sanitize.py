"""The CUDA kernels' tests under compute-sanitizer, its four tools side by side on one GPU.

    python -m benchmarks.sanitize                        all of tests/kernels with small shapes
    python -m benchmarks.sanitize --only norm rope       tests/kernels/test_norm.py and test_rope.py
    python -m benchmarks.sanitize --tools memcheck

memcheck: accesses out of bounds; racecheck: hazards in shared memory; synccheck: barriers that not all reach;
initcheck: reads of memory that nobody wrote. Only kernels of ours are looked at. Fails when a tool finds something, a
test fails, or no test ran. Needs a GPU, compute-sanitizer of the CUDA toolkit, and megakern._C (`make gpu` builds it).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megakern.ops.dispatch import UNAVAILABLE

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # exit status when a tool found something


def find() -> str | None:
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def command(sanitizer: str, tool: str, files: list[str]) -> list[str]:
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    # The compiler's tests launch the same kernels, after minutes of other work under the tool.
    tests += ["-k", "cuda and not compile and not opcheck", *files]
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10"]
    return [sanitizer, *options, "--kernel-name", "kns=megakern", *tests]


def run(sanitizer: str, tool: str, files: list[str], limit: float) -> tuple[bool, str, str]:
    """-> is it clean, one line, all output."""
    # Each tensor in an allocation of its own, so that one byte beyond it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command(sanitizer, tool, files), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return False, f"{tool:<10} not done after {limit:.0f} s", str(expired.stdout)
    text, passed = done.stdout + done.stderr, re.search(r"(\d+) passed", done.stdout)
    clean = done.returncode == 0 and passed is not None
    verdict = "clean" if clean else "found errors" if done.returncode == FOUND else f"exit status {done.returncode}"
    tests = passed.group(1) if passed else "0"
    return clean, f"{tool:<10} {verdict}, {tests} tests, {time.perf_counter() - start:.0f} s", text


def main() -> int:
    parser = argparse.ArgumentParser(description="The CUDA kernels' tests under compute-sanitizer.")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--only", nargs="+", metavar="STEM", help="these files of tests/kernels")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each tool")
    options = parser.parse_args()
    if UNAVAILABLE["cuda"] is not None:
        parser.error(f"the cuda backend is not usable: {UNAVAILABLE['cuda']}")
    sanitizer = find()
    if sanitizer is None:
        parser.error("compute-sanitizer is neither on the PATH nor in CUDA_HOME; install CUDA's toolkit")
    files = [f"tests/kernels/test_{stem}.py" for stem in options.only] if options.only else ["tests/kernels"]
    with ThreadPoolExecutor(len(options.tools)) as pool:
        results = list(pool.map(lambda tool: run(sanitizer, tool, files, options.limit), options.tools))
    for clean, _, text in results:
        if not clean:
            print(text[-8000:])
    print("\n".join(line for _, line, _ in results))
    return 0 if all(clean for clean, _, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
