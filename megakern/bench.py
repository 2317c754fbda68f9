"""`megakern bench`: finds the benchmarks, which are a folder beside the package, and runs them.

In a checkout that folder is `benchmarks/`. A wheel holds a copy of it in `megakern/_suite/`, not at the top: a package
of the name `benchmarks` in site-packages would stand in the way of other people's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megakern.config import ConfigError, require

PACKAGE = Path(__file__).resolve().parent


def find_suite(package: Path = PACKAGE) -> Path:
    """The folder that `benchmarks/` is in. Raises ConfigError when it is nowhere."""
    for folder in (package.parent, package / "_suite"):
        if (folder / "benchmarks" / "suite.py").exists():
            return folder
    raise ConfigError(
        f"bench: the benchmarks are neither in {package.parent} nor in {package / '_suite'}; install megakern's wheel, "
        f"or run it from a checkout"
    )


def bench(*, only: tuple[str, ...], quick: bool, out: Path | None, minutes: float | None, backend: str | None) -> int:
    """Run the suite; returns the exit code: 1 when something of ours failed. Raises ConfigError for wrong options."""
    root = str(find_suite())
    if root not in sys.path:
        sys.path.insert(0, root)
    from benchmarks import suite
    from megakern.ops.dispatch import BACKENDS
    from megakern.train import machine

    require(
        backend is None or backend in BACKENDS,
        f"bench: --backend must be one of {', '.join(BACKENDS)}, got {backend!r}",
    )
    require(minutes is None or minutes > 0, f"bench: --minutes must be above 0, got {minutes}")
    seconds, grace = (suite.QUICK_SECONDS, suite.QUICK_GRACE) if quick else (suite.FULL_SECONDS, suite.GRACE)
    try:
        chosen = suite.Suite(
            out=out,
            only=only,
            kind=machine.device_type(),
            quick=quick,
            budget=seconds if minutes is None else max(5.0, 60 * minutes - grace),  # what has begun may take that
            backend=backend,
        )
    except ValueError as error:
        raise ConfigError(f"bench: {error}") from error
    return 0 if suite.run(chosen) else 1
