"""The loss curve of a run as a picture, drawn from metrics.jsonl alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megakern.config import ConfigError, require
from megakern.train.metrics import read_metrics

SUFFIXES = (".png", ".svg", ".pdf")


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_run(run: Path, out: Path | None = None) -> Path:
    """Draw training and held-out loss over tokens; returns the file (default RUN/curve.png; .svg and .pdf work too).

    Raises ConfigError: another ending, matplotlib or the metrics are missing; OSError.
    """
    out = out or run / "curve.png"
    require(out.suffix in SUFFIXES, f"plot: --out must end in {', '.join(SUFFIXES)}, got {str(out)!r}")
    if not have_matplotlib():
        raise ConfigError("plot: needs matplotlib; install it with: pip install 'megakern[plot]'")
    records = read_metrics(run / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    if not train:
        raise ConfigError(f"plot: {run / 'metrics.jsonl'} has no training steps yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], lw=0.6, alpha=0.4, color="tab:blue")
    axes.plot([r["tokens"] / 1e6 for r in train], _smooth([r["loss"] for r in train]), color="tab:blue", label="train")
    if held_out:
        tokens, losses = [r["tokens"] / 1e6 for r in held_out], [r["loss"] for r in held_out]
        axes.plot(tokens, losses, "o-", color="tab:red", label="held out")
        for order, style in (("unigram", ":"), ("bigram", "--")):
            value = held_out[-1].get(order)
            if value is not None:
                axes.axhline(value, ls=style, color="gray", label=f"{order} of the held-out tokens")
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)
    return out


def _smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential mean with the start-up bias removed."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
