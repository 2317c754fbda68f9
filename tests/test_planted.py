"""Bugs planted in the kernels (tests/planted.py): each has its place in the sources, and each is caught."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import planted, planted_attention, planted_product
from tests.planted import Bug

BUGS = [*planted_attention.BUGS, *planted_product.BUGS]


def test_every_bug_has_its_place():
    """A source that has changed since changes the table too."""
    for file in {bug.file for bug in BUGS}:
        planted.planted((planted.CSRC / file).read_text(), [(i, bug) for i, bug in enumerate(BUGS) if bug.file == file])
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert all(bug.old.split() != bug.new.split() for bug in BUGS)
    assert all((planted.ROOT / file).exists() for bug in BUGS for file in bug.tests)


def test_bugs_whose_places_overlap_share_one_question():
    source = "first();\n  second(x + 1);\n  third();\n"
    bugs = [Bug("a", "f", "second(x + 1);\nthird();", "third();", ()), Bug("b", "f", "x + 1", "x", ()),
            Bug("c", "f", "@first();@\nsecond", ";", ())]  # fmt: skip
    text = " ".join(planted.planted(source, list(enumerate(bugs, 1))).split())
    ask = "if (megakern::planted_bug == {}) {{ {} }}"
    right = "second(x + 1); third();"
    assert text == (
        f"{ask.format(3, ';')} else {{ first(); }} "
        f"{ask.format(2, 'second(x); third();')} else {{ {ask.format(1, 'third();')} else {{ {right} }} }}"
    )
    assert planted.planted("y = x + 1;", [(2, bugs[1])]) == "y = (megakern::planted_bug == 2 ? (x) : (x + 1));"
    with pytest.raises(ValueError, match="b: f has its place 2 times, wanted once"):
        planted.planted("x + 1; x + 1", [(1, bugs[1])])


@pytest.mark.slow
def test_every_bug_is_caught():
    run = subprocess.run([sys.executable, "-m", "tests.planted"], cwd=planted.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
