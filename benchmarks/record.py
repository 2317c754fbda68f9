"""Measures this machine and makes it a part of the project: results, pictures, tables, the machine's page.

    python -m benchmarks.record [--minutes 15] [--machine NAME] [--only PART ...]

For a machine that is idle. The figures are in benchmarks/results/<machine>/; what was not measured now stays as it was.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import plots, suite, tables
from benchmarks.common import machine_facts
from megakern.train import machine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="for measuring; pictures take seconds more")
    parser.add_argument("--machine", help="folder of results (default: that of this processor, or a new one)")
    parser.add_argument("--only", nargs="+", default=(), metavar="PART", help="as megakern bench --only")
    options = parser.parse_args(arguments)
    facts = machine_facts()
    folder = tables.RESULTS / options.machine if options.machine else tables.folder_of(facts)
    print(f"into {folder.relative_to(tables.ROOT)}", flush=True)
    sound = suite.run(
        suite.Suite(
            out=folder,
            only=tuple(options.only),
            kind=machine.device_type(),
            budget=max(5.0, 60 * options.minutes - suite.GRACE),
            facts=facts,
        )
    )
    (folder / "bench.log").unlink(missing_ok=True)
    plots.draw(folder)
    tables.write()
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
