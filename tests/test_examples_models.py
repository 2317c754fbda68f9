"""The examples that make models: each in a short version; in full, with the score that they promise, when slow."""

from __future__ import annotations

import importlib
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from examples import code_model, conversation, demo, shared, translation
from tests import commands

PROMISED = {"translation": 0.9, "conversation": 0.9}


@pytest.fixture
def forked(monkeypatch):
    """Commands of the examples in forks of a process that has imported all: a tenth of a second instead of three."""

    def megakern(*words: object) -> str:
        return commands.finish(commands.start(*words), timeout=600)

    for module in (shared, code_model):
        monkeypatch.setattr(module, "megakern", megakern)


def run_example(name: str, out: Path, monkeypatch, capsys, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(out), *options])
    importlib.import_module(f"examples.{name}").main()
    return capsys.readouterr().out


def test_the_demo_begins_and_goes_on(tmp_path, monkeypatch, capsys):
    """All of `make demo` on the sources of one folder, with a narrow model; started again, nothing is made twice."""
    small = "--train.steps 4 --train.save_every 2 --train.eval_every 0 --model.width 32 --model.sequence_length 32"
    ran: list[list[str]] = []

    def megakern(*words: object) -> None:
        ran.append([str(word) for word in words])
        more = [*small.split(), "--data.path", str(demo.DATA)] if words[0] == "train" else []
        print(commands.finish(commands.start(*words, *more), timeout=600))

    (tmp_path / "examples").mkdir()
    shutil.copy(demo.HERE / "demo.toml", tmp_path / "examples")
    library = str(demo.HERE.parent / "megakern" / "data")
    for name, value in (("HERE", tmp_path / "examples"), ("DATA", tmp_path / "data"), ("RUN", tmp_path / "run")):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "megakern", megakern)
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": library})
    demo.main()
    shown = capsys.readouterr().out
    assert [words[0] for words in ran] == ["prepare", "train", "ckpt", "generate"]
    for text in ("held-out loss", "2 processes", "step-00000004", "import os", "tokens/s, prompts included"):
        assert text in shown, shown
    assert shown.rstrip().endswith("look at run/curve.png") and (tmp_path / "run/curve.png").exists()
    ran.clear()
    demo.main()
    assert ran[0][:2] == ["train", "--resume"] and len(ran) == 3
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["translation", "conversation", "code_model"])
def test_short_versions_run_and_go_on(name, forked, tmp_path, monkeypatch, capsys):
    shown = run_example(name, tmp_path, monkeypatch, capsys, "--short")
    assert f"megakern chat {tmp_path / 'run'}" in shown
    assert (tmp_path / "run/chat_template.jinja").exists() and (tmp_path / "run/ckpt/step-00000004").is_dir()
    before = (tmp_path / "run/ckpt/step-00000004/manifest.json").read_bytes()
    if name != "translation":  # one of them is enough
        return
    run_example(name, tmp_path, monkeypatch, capsys, "--short")  # started again, there is nothing left to train
    assert (tmp_path / "run/ckpt/step-00000004/manifest.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_full_versions_reach_their_score(name, tmp_path):
    import subprocess

    words = [sys.executable, shared.ROOT / f"examples/{name}.py", "--out", tmp_path]
    done = subprocess.run(words, cwd=shared.ROOT, capture_output=True, text=True, timeout=3000, check=True)
    score = float(re.search(r"right word for word \(([0-9.]+)\)", done.stdout)[1])
    assert score >= PROMISED[name], done.stdout[-2000:]


def test_the_grammar_of_veshi():
    """Cases by hand: verb first with tense, number and case and article on nouns, adjectives after and in number."""
    draw = random.Random(0)
    pairs = [translation.sentence(draw) for _ in range(3000)]
    by_english: dict[str, set[str]] = {}
    for english, veshi in pairs:
        by_english.setdefault(english, set()).add(veshi)
    assert all(len(each) == 1 for each in by_english.values())  # what is asked has one answer
    assert len(by_english) > 2900

    class Script:
        """Choices one after the other."""

        def __init__(self, *choices):
            self.choices = list(choices)

        def choice(self, options):
            value = self.choices.pop(0)
            assert value in options
            return value

        def sample(self, options, count):
            return self.choices.pop(0)

        def random(self):
            return self.choices.pop(0)

    script = Script("child", 0.1, 0.1, 2, ["small", "wise"], "tree", 0.9, 0.9, 1, ["old"], "sees", 0.1)
    assert translation.sentence(script) == (
        "the small wise children saw an old tree",
        "gatol paviimta pikiim omlaim dolmen hodu",
    )


def test_dialogues_can_be_answered_from_what_was_said():
    draw = random.Random(3)
    for _ in range(300):
        messages = conversation.dialogue(draw)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        for index, message in enumerate(messages[:-1]):
            for fact, (values, told, _, question, answer) in conversation.FACTS.items():
                if message["content"] != question:
                    continue
                said = [value for value in values for m in messages[:index] if m["content"] == told.format(value)]
                wanted = answer.format(*said) if said else conversation.UNKNOWN
                assert len(said) <= 1 and messages[index + 1]["content"] == wanted, fact


def test_functions_are_cut_into_head_and_body(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('class A:\n    def f(self, x):\n        """Doc."""\n        return x + 1\n\n\ndef g():\n    pass\n')
    assert sorted(code_model.functions([path]), key=str) == [
        {"prompt": 'def f(self, x):\n    """Doc."""', "response": "    return x + 1"},
        {"prompt": "def g():", "response": "    pass"},
    ]
