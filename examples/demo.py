"""The demo, run by `make demo`: from Python's own source to a model that writes Python.

Each step is a command that you can run yourself; it is printed before it runs. Started again, it goes on where it
stopped.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
DATA, RUN = DEMO / "data", DEMO / "run"
HEADS = 8  # of the demo's model: what tensor parallelism can be divided into


def processes() -> int:
    """Two on a CPU; on GPUs the largest number of them that divides the heads."""
    import torch

    if not torch.cuda.is_available():
        return 2
    return max(n for n in range(1, torch.cuda.device_count() + 1) if HEADS % n == 0)


def megakern(*arguments: object) -> None:
    """Print the command, run it, end with its exit code when it fails."""
    words = [str(word) for word in arguments]
    shown = [str(Path(w).relative_to(HERE.parent)) if w.startswith(str(HERE.parent)) else w for w in words]
    print(f"\n$ megakern {shlex.join(shown)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "megakern", *shown], cwd=HERE.parent, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    started = time.monotonic()
    if not (DATA / "manifest.json").exists():
        library = sysconfig.get_paths()["stdlib"]
        which = ("--include", "*.py", "--exclude", "site-packages", "test")
        megakern("prepare", library, *which, "--out", DATA, "--vocab-size", 4096, "--validation", 0.04)
    if (RUN / "config.toml").exists():
        megakern("train", "--resume", RUN, "--nproc", processes())
    else:
        count = processes()
        layout = [] if count == 2 else ["--parallel.tp", count]  # demo.toml has 2
        megakern("train", HERE / "demo.toml", "--out", RUN, "--nproc", count, *layout)
    megakern("ckpt", "ls", RUN)
    megakern("generate", RUN, "--prompt", "import os", "--max-tokens", 150, "--temperature", 0.7)
    print(f"\ndemo done in {time.monotonic() - started:.0f} s; look at {RUN.relative_to(HERE.parent) / 'curve.png'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
