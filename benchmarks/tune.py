"""Every table of configurations, timed on a GPU: what to read before a table in megakern/kernels is changed.

    python -m benchmarks.tune [NAME ...] [--out DIR] [--budget SECONDS]        or: make gpu GPU="--only tune"

Each NAME is a script of its own, benchmarks/tune_<NAME>.py, with options of its own; here they run one after another
with their defaults. "triton" is `mk.autotune` over the shapes of the benchmarks: the named configurations of
megakern/kernels/triton/configs.py. DIR gets a log and a JSON file a name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import suite
from benchmarks.gpu_tests import ROOT

SCRIPTS = ("attention", "linear", "loss", "norm", "overlap")
NAMES = (*SCRIPTS, "triton")


def run(names: tuple[str, ...], out: Path, deadline: float) -> bool:
    """Runs them in this order; False when one failed. What time forbids is named."""
    out.mkdir(parents=True, exist_ok=True)
    sound = True
    for name in names:
        if time.monotonic() > deadline - 5:
            print(f"tune {name}: LEFT OUT, no time left", flush=True)
        elif name == "triton":
            suite.run_ops(suite.Suite(out=out, kind="cuda", backend="triton", compile=False, tune=out), deadline)
            print(f"\n{tuned(out)}", flush=True)
        else:
            sound &= _run_script(name, out, deadline)
    return sound


def _run_script(name: str, out: Path, deadline: float) -> bool:
    log = out / f"tune_{name}.log"
    words = [sys.executable, "-m", f"benchmarks.tune_{name}", "--json", str(out / f"tune_{name}.json")]
    with log.open("w") as file:
        try:
            code = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                  timeout=max(1.0, deadline - time.monotonic())).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{log.read_text()}\ntune {name}: ENDED, no time left", flush=True)
            return True
    print(f"{log.read_text()}\ntune {name}: {f'FAILED with exit code {code}' if code else 'done'}", flush=True)
    return code == 0


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for results and logs")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: no such table; the tables are {', '.join(NAMES)}")
    return 0 if run(tuple(options.names) or NAMES, options.out, time.monotonic() + options.budget) else 1


if __name__ == "__main__":
    sys.exit(main())
