"""README and docs/ keep their word: snippets run, commands parse, tables are those of the results. No device needed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import tables
from megakern.cli import OPTIONS_BESIDE_SETTINGS, _parser, _split_settings
from megakern.model.presets import presets

PAGES = {page.relative_to(tables.ROOT): page.read_text() for page in tables.readers_pages()}
TRAINING = PAGES[Path("docs/training.md")]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if snippets(text)], ids=str)
def test_snippets_of_a_page_run_one_after_the_other(page):
    names: dict[str, object] = {}
    for snippet in snippets(PAGES[page]):
        exec(compile(snippet, str(page), "exec"), names)


def test_pages_have_snippets():
    found = {str(page): len(snippets(text)) for page, text in PAGES.items()}
    assert found["README.md"] and found["docs/models.md"] and found["docs/api.md"] >= 4


def commands() -> list[str]:
    shown = re.findall(r"^\$ megakern ((?:[^\n]*\\\n)*[^\n]*)", "\n".join(PAGES.values()), re.M)
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


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tables_are_those_of_the_results(page):
    assert tables.with_tables(PAGES[page]) == PAGES[page], "run: python -m benchmarks.tables --write"


def test_every_table_has_its_page():
    marks = [mark for text in PAGES.values() for mark in re.findall(r"<!-- (goals|speeds|faults) -->", text)]
    assert sorted(marks) == ["faults", "goals", "speeds"]


def test_presets_are_all_named():
    text = TRAINING.split("takes a known shape:")[1].split("\n\n")[0].split("[examples")[0]
    named: set[str] = set()
    for span in re.findall(r"`([^`]+)`", text):
        first, *more = span.split()
        family = first.rsplit("-", 1)[0] if more else ""
        named |= {first, *(family + suffix for suffix in more)}
    assert named == set(presets)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert target.startswith("http") or (tables.ROOT / page.parent / target).exists(), target
