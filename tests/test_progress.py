"""What long work says: bars and names on a terminal, lines when piped, and which commands say it."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from megakern.data import progress
from megakern.data.progress import Meanwhile, Progress
from megakern.evaluate import evaluate_run, evaluate_text
from tests.runs import config_of, train


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A clock that gains 8 s at each look at it."""
    clock = iter(range(0, 10**6, 8))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))


def test_a_line_has_the_share_and_what_is_left(capsys):
    with Progress(8, "reading") as bar:
        for _ in range(8):
            bar.update(1)
    # Looks at 8 s, 16 and 24 (to say it) ...: the first line comes 24 s after the start, with 2 of 8 parts done.
    assert capsys.readouterr().err.splitlines() == [
        "reading: 25%, 1:12 left", "reading: 50%, 0:48 left", "reading: 75%, 0:24 left", "reading: 100%, 0:00 left",
    ]  # fmt: skip


def test_without_a_total_a_line_has_the_time(capsys):
    with Progress(0, "reading") as bar, Progress(9, "hidden", shown=False) as hidden:
        for _ in range(4):
            bar.update(1)
            hidden.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"reading: \d:\d\d so far", line) for line in lines), lines


def test_names_of_steps(capsys, monkeypatch):
    with Meanwhile() as meanwhile:
        for name in "abcde":
            meanwhile.say(name)
    assert capsys.readouterr().err == "a\nc\ne\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Meanwhile() as meanwhile:
        meanwhile.say("f")
    assert capsys.readouterr().err == "\r\x1b[Kf\r\x1b[K"


def test_evaluation_says_how_far_it_is_when_piped(tiny_data, tmp_path, capsys):
    """At the end of `train`, and by `eval`, of held-out tokens and of a text."""
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_text("some words of a line\n" * 100)
    works = {
        "evaluating": (lambda: train(run, config_of(tiny_data, steps=1)), lambda: evaluate_run(run)),
        "scoring": (lambda: evaluate_text(run, text),),
    }
    for what, ways in works.items():
        for work in ways:
            work()
            found = capsys.readouterr().err
            assert re.fullmatch(rf"({what}: \d+%, \d+:\d\d left\n)+", found), found
