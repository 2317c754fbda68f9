"""The metrics file, the progress line, the curve. No device needed."""

from __future__ import annotations

import io
import json

import pytest

from megakern.config import ConfigError
from megakern.train import plot
from megakern.train.metrics import MetricsFile, ProgressLine, duration, quantity, read_metrics


def test_records_after_the_resumed_step_are_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(5):
        first.write(kind="train", step=step, loss=1 / 3 + step, tokens=step)
    first.close()
    path.write_text(path.read_text() + '{"kind": "train", "step": 5, "lo')  # cut short by a crash
    second = MetricsFile(path, 3)
    second.write(kind="train", step=3, loss=9.0, tokens=3)
    second.close()
    records = read_metrics(path)
    assert [record["loss"] for record in records] == [1 / 3, 1 / 3 + 1, 1 / 3 + 2, 9.0]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream) -> str:
    progress = ProgressLine(20, 10, stream)
    for step in range(1, 21):
        progress.update(step, loss=2.5, rate=1234.5, mfu=0.421, left=61)
    progress.say("saved")
    progress.end()
    return stream.getvalue()


def test_piped_progress_is_plain_lines():
    assert lines(io.StringIO()) == (
        "step 10/20  loss 2.5000  1,234 tokens/s  MFU 42.1%  1:01 left\n"
        "step 20/20  loss 2.5000  1,234 tokens/s  MFU 42.1%  1:01 left\n"
        "saved\n"
    )


def test_terminal_progress_is_one_line_written_over():
    text = lines(Terminal())
    assert text.count("\r\x1b[K") == 21
    assert text.count("\n") == 2


def test_progress_shows_means_of_the_steps_since_the_last_line():
    stream = io.StringIO()
    progress = ProgressLine(4, 2, stream)
    for step, (loss, rate) in enumerate([(9.0, 100.0), (3.0, 300.0), (float("nan"), 200.0), (2.0, 200.0)], start=1):
        progress.update(step, loss=loss, rate=rate, mfu=rate / 1000, left=0)
    assert stream.getvalue() == (
        "step 2/4  loss 6.0000  150 tokens/s  MFU 15.0%  0:00 left\n"  # as many tokens in twice the time
        "step 4/4  loss 2.0000  200 tokens/s  MFU 20.0%  0:00 left  (1 of 2 steps not finite)\n"
    )


def test_durations_and_quantities():
    assert [duration(s) for s in (0, 59.9, 61, 3723, -5)] == ["0:00", "0:59", "1:01", "1:02:03", "0:00"]
    assert [quantity(v, "B/s") for v in (5, 4.25e3, 4.2e11, 1e12)] == ["5 B/s", "4.25 kB/s", "420 GB/s", "1 TB/s"]
    assert [quantity(v, "B") for v in (999.4e6, 999.96e6)] == ["999 MB", "1 GB"]


def test_curve_is_drawn_from_the_metrics_alone(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in range(30):
        metrics.write(kind="train", step=step, loss=5 - step / 10, tokens=step * 100)
    metrics.write(kind="eval", step=29, loss=3.0, tokens=3000, unigram=6.0, bigram=4.0)
    metrics.close()
    png = plot.plot_run(tmp_path)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"bigram of the held-out tokens" in plot.plot_run(tmp_path, tmp_path / "curve.svg").read_bytes()
    for name in ("curve.gif", "curve"):
        with pytest.raises(ConfigError, match=rf"plot: --out must end in \.png, \.svg, \.pdf, got '.*{name}'"):
            plot.plot_run(tmp_path, tmp_path / name)
        assert not list(tmp_path.glob(f"{name}*gif"))


def test_curve_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="has no training steps yet"):
        plot.plot_run(tmp_path)
    monkeypatch.setattr(plot, "have_matplotlib", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'megakern\[plot\]'"):
        plot.plot_run(tmp_path)


def test_smoothing_of_a_constant_is_the_constant():
    assert plot._smooth([2.0] * 10) == pytest.approx([2.0] * 10)
