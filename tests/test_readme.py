"""README and docs/ keep their word: snippets run, commands parse, tables are those of the results. No device needed."""

from __future__ import annotations

import ast
import inspect
import operator
import re
import shlex
from pathlib import Path

import pytest

import megakern
from benchmarks import tables
from megakern.cli import OPTIONS_BESIDE_SETTINGS, _parser, _split_settings
from megakern.config import known_keys
from megakern.model.presets import presets
from megakern.train.config import RunConfig

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


TEXT = "\n".join(PAGES.values())


def commands() -> list[str]:
    """Those shown with their output."""
    shown = re.findall(r"^\$ megakern ((?:[^\n]*\\\n)*[^\n]*)", TEXT, re.M)
    return [re.sub(r"\\\n\s*", "", command) for command in shown]


def named_commands() -> list[str]:
    """Those in text, tables and examples that are whole: no choices, optional parts or repetitions."""
    spans = re.findall(r"`megakern ([^`]+)`", TEXT) + re.findall(r"^    megakern ([^\n#&]+)", TEXT, re.M)
    whole = [span.strip() for span in spans if not re.search(r"[|\[]|\.\.\.|COMMAND|FOLDER$|^\w+$", span)]
    return sorted({span.replace(" N", " 2") for span in whole} - set(commands()))


def test_commands_are_found():
    assert len(commands()) >= 12 and len(named_commands()) >= 20


@pytest.mark.parametrize("command", commands() + named_commands())
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


def test_every_public_name_is_on_the_page_of_the_api():
    page = PAGES[Path("docs/api.md")]
    named = set(re.findall(r"`mk\.(\w+)`", page.split("## All names")[1]))
    assert named == set(megakern.__all__) - {"__version__"}


def test_presets_are_all_named():
    text = TRAINING.split("takes a known shape:")[1].split("\n\n")[0].split("[examples")[0]
    named: set[str] = set()
    for span in re.findall(r"`([^`]+)`", text):
        first, *more = span.split()
        family = first.rsplit("-", 1)[0] if more else ""
        named |= {first, *(family + suffix for suffix in more)}
    assert named == set(presets)


MIGRATE = PAGES[Path("docs/migrate.md")]


def cells(column: int) -> list[str]:
    """The code in one column of the tables of calls: 0 theirs, 1 ours, 2 remarks."""
    rows = [line.strip("|").split("|") for line in MIGRATE.split("## What runs")[0].splitlines() if line[:2] == "| "]
    assert {len(row) for row in rows} == {3}
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row[column])]


def test_our_calls_in_the_page_for_others_can_be_made():
    found = 0
    for call in [span for span in cells(1) + cells(2) if span.startswith("mk.")]:
        tree = ast.parse(call, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mk":
                getattr(megakern, node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("mk."):
                function = operator.attrgetter(ast.unparse(node.func)[3:])(megakern)
                starred = any(isinstance(each, ast.Starred) for each in node.args)
                names = {keyword.arg: None for keyword in node.keywords}
                if function != megakern.ParallelContext.create:  # it takes the fields of its class too
                    inspect.signature(function).bind(*([None] * (3 if starred else len(node.args))), **names)
                found += 1
    assert found >= 30


def test_settings_in_the_page_for_others_exist():
    named = [span for span in cells(1) if re.fullmatch(r"[a-z]+\.[a-z_0-9]+", span)]
    assert len(named) >= 45 and set(named) <= set(known_keys(RunConfig))


def test_commands_in_the_page_for_others_parse():
    shown = [span for span in cells(1) + cells(2) if span.startswith("megakern ")]
    assert len(shown) >= 5
    for command in shown:
        assert _parser().parse_args(shlex.split(command)[1:]).command in command


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert target.startswith("http") or (tables.ROOT / page.parent / target).exists(), target
