"""README keeps its word: snippets run, commands parse, tables are those of the committed results. No device needed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import tables
from megakern.cli import OPTIONS_BESIDE_SETTINGS, _parser, _split_settings
from megakern.model.presets import presets

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_snippets_run_one_after_the_other():
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(snippets) >= 4
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def commands() -> list[str]:
    shown = re.findall(r"^\$ megakern ((?:[^\n]*\\\n)*[^\n]*)", README, re.M)
    return [re.sub(r"\\\n\s*", "", command) for command in shown]


@pytest.mark.parametrize("command", commands())
def test_commands_that_are_shown_exist(command):
    words = shlex.split(command)
    if words[0] in OPTIONS_BESIDE_SETTINGS:
        words, _ = _split_settings(words, OPTIONS_BESIDE_SETTINGS[words[0]])
    options = _parser().parse_args(words)
    assert options.command == words[0]


def test_every_command_is_shown_with_its_output():
    shown = {shlex.split(command)[0] for command in commands()}
    assert shown == {
        "prepare",
        "train",
        "eval",
        "generate",
        "plot",
        "ckpt",
        "doctor",
        "verify",
        "plan",
        "convert",
        "serve",
    }


def test_tables_of_speed_and_faults_are_those_of_the_results():
    assert tables.with_tables(README) == README, "run: python -m benchmarks.tables --write"


def test_presets_are_all_named():
    text = README.split("takes a known shape:")[1].split("\n\n")[0].split("[examples")[0]
    named: set[str] = set()
    for span in re.findall(r"`([^`]+)`", text):
        first, *more = span.split()
        family = first.rsplit("-", 1)[0] if more else ""
        named |= {first, *(family + suffix for suffix in more)}
    assert named == set(presets)


def test_relative_links_exist():
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
