"""Pictures of the committed results, made from those files alone: docs/speed/<machine>/<part>.png and .svg.

    python -m benchmarks.plots [--machine NAME ...]

A picture carries the digest of the figures that it shows, by which a test knows that it is not an old one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import tables
from megakern.train.plot import have_matplotlib

FOLDER = tables.ROOT / "docs" / "speed"
ENDINGS = ("png", "svg")
OURS, PEERS = "tab:green", "tab:gray"


def colour(name: str) -> str:
    return OURS if name.startswith("megakern") else PEERS


def digest(results: dict) -> str:
    """Of what a picture is made of, whatever the JSON file's layout."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:32]


def digest_in(picture: Path) -> str | None:
    """The digest that a picture carries, or None."""
    found = re.search(rb"megakern figures ([0-9a-f]{32})", picture.read_bytes())
    return found.group(1).decode() if found else None


def drawn(folder: Path) -> dict[str, dict]:
    """Picture's name -> the results that it shows, for what this machine has figures of."""
    files = tables.figures(folder)
    found = {name: files[name] for name in DRAW if name in files}
    ops = tables.ops_of(files)
    return {**found, "ops": ops} if ops else found


def draw(folder: Path) -> list[Path]:
    """Draws what `drawn` says; returns the files. Letters of an SVG file stay text: 0.4 of what their outlines
    take."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    target = FOLDER / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for name, results in drawn(folder).items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        {**DRAW, "ops": _ops}[name](figure, results)
        figure.suptitle(f"{name}: {_machine(results)}", fontsize=9)
        mark = f"megakern figures {digest(results)}"
        for ending in ENDINGS:
            path = target / f"{name}.{ending}"
            metadata = {"Description": mark} | ({"Date": None} if ending == "svg" else {"Software": None})
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
                figure.savefig(path, dpi=100, metadata=metadata)
            made.append(path)
    return made


def _machine(results: dict) -> str:
    facts = results["machine"] if "machine" in results else next(iter(results.values()))["machine"]
    return f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, {facts['date']}"


def _bars(axes, names: list[str], values: list[float], labels: list[str], spreads=None) -> None:
    axes.barh(names, values, color=[colour(name) for name in names], xerr=spreads, ecolor="black", capsize=2)
    for at, label in enumerate(labels):
        axes.text(0, at, f" {label}", va="center", fontsize=8, color="white")
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)


def _train(figure, results: dict) -> None:
    workloads = [w for w in results["workloads"] if any("ms" in row for row in w["rows"])]
    figure.set_size_inches(2 + 6 * len(workloads), 4.5)
    for axes, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        rows = [row for row in workload["rows"] if "ms" in row]
        rates = [row["tokens_per_second"] for row in rows]
        low = [rate * (1 - row["ms"] / row["slowest_ms"]) for rate, row in zip(rates, rows, strict=True)]
        high = [rate * (row["ms"] / row["fastest_ms"] - 1) for rate, row in zip(rates, rows, strict=True)]
        labels = [f"{rate:,.0f} ({row['ratio_to_first']:.2f} x)" for rate, row in zip(rates, rows, strict=True)]
        _bars(axes, [row["contestant"] for row in rows], rates, labels, [low, high])
        axes.set_title(workload["name"], fontsize=9)
        axes.set_xlabel("tokens/s")


def _generate(figure, results: dict) -> None:
    rows = [row for row in results["rows"] if "tokens_per_second" in row]
    rates = [row["tokens_per_second"] for row in rows]
    axes = figure.subplots()
    _bars(axes, [row["contestant"] for row in rows], rates, [f"{rate:.1f}" for rate in rates])
    axes.set_xlabel("tokens/s at batch 1")


def _curves(figure, results: dict) -> None:
    axes = figure.subplots()
    for row in results["rows"]:
        mean = [sum(step) / len(step) for step in zip(*row["curves"], strict=True)]
        low, high = ([pick(step) for step in zip(*row["curves"], strict=True)] for pick in (min, max))
        (line,) = axes.plot(mean, label=row["contestant"], lw=1)
        axes.fill_between(range(len(mean)), low, high, alpha=0.2, color=line.get_color())
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, nats a token; band: {results['seeds']} seeds")
    axes.legend()


def _scaling(figure, results: dict) -> None:
    axes = figure.subplots()
    rows = results["rows"]
    labels = [f"{row['speedup']:.2f} x one core" for row in rows]
    _bars(axes, [f"megakern {row['layout']}" for row in rows], [row["tokens_per_second"] for row in rows], labels)
    axes.set_xlabel("tokens/s")


def _growth(figure, results: dict) -> None:
    figure.set_size_inches(10, 6)
    axes = figure.subplots()
    for row in results["rows"]:
        axes.loglog(row["sizes"], row["ms"], "o-", lw=1, ms=3, label=f"{row['op']}: {row['exponent']:.2f}")
    axes.set_xlabel("size")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, title="exponent", title_fontsize=7)


def _ops(figure, files: dict[str, dict]) -> None:
    """A dot for each shape: how many times as fast as the fastest peer."""
    points: dict[str, list[float]] = {}
    for results in files.values():
        groups: dict[tuple, list[dict]] = {}
        for row in results["rows"]:
            groups.setdefault((row["op"], row["shape"], row["backward"]), []).append(row)
        for (op, _, backward), rows in groups.items():
            ours = [row["us"] for row in rows if "us" in row and row["contestant"].startswith("megakern")]
            peers = [row["us"] for row in rows if "us" in row and not row["contestant"].startswith("megakern")]
            if ours and peers:
                points.setdefault(f"{op}{', backward' if backward else ''}", []).append(min(peers) / min(ours))
    figure.set_size_inches(8, max(3.0, 0.28 * len(points) + 1))
    axes = figure.subplots()
    for at, (_, ratios) in enumerate(points.items()):
        axes.plot(ratios, [at] * len(ratios), "o", color=OURS, ms=4, alpha=0.7)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(points)), list(points), fontsize=7)
    axes.invert_yaxis()
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("times as fast as the fastest peer, a dot a shape")
    axes.grid(alpha=0.3, axis="x")


DRAW: dict[str, Callable] = {
    "train": _train, "patch": _train, "generate": _generate, "curves": _curves, "scaling": _scaling, "growth": _growth,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    machines = {folder.name: folder for folder in tables.folders() if drawn(folder)}
    parser.add_argument("--machine", nargs="+", choices=machines, default=list(machines))
    options = parser.parse_args()
    if not have_matplotlib():
        sys.exit("plots: need matplotlib; install it with: pip install 'megakern[plot]'")
    for name in options.machine:
        for path in draw(machines[name]):
            print(path.relative_to(tables.ROOT))


if __name__ == "__main__":
    main()
