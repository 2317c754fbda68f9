"""Bugs planted in the kernels of attention and of products, one at a time: the tests of each must fail.

    python -m tests.planted [word ...]      those whose name has one of the words; prints which test caught each

A bug is a piece of a source and what stands in its place, both whole statements or both whole expressions. All bugs of
a source are compiled into one module for the emulator, each behind a question to PLANTED_BUG, which is read when the
module is loaded; every bug then gets a process of its own for the tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401 - once, before the forks; not megakern, which loads its modules when it is imported

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# All with bugs, and what includes those, so that each finds the others in its own folder first.
SOURCES = ("attention*", "device/attention*", "linear.cu", "product.cuh", "device/epilogue.cuh")
FAILED = 1  # of pytest: some test failed
HANGS = 900  # seconds
HEADER = """#pragma once
#include <cstdlib>
namespace megakern {
inline const int planted_bug = [] {
  const char* number = std::getenv("PLANTED_BUG");
  return number == nullptr ? 0 : std::atoi(number);
}();
}
"""


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    """Below csrc/."""
    old: str
    """What stands there, once. Blanks at the start of lines do not count. Between @ and @, where those are: the place;
    what is around them only finds it."""
    new: str
    tests: tuple[str, ...]


def pattern(text: str) -> re.Pattern:
    lines = [re.escape(line.strip()) for line in text.strip().splitlines()]
    found = r"\n\s*".join(lines)
    return re.compile(found.replace("@", "(", 1).replace("@", ")", 1) if "@" in text else f"({found})")


def is_statement(text: str) -> bool:
    return re.sub(r"//.*$", "", text.strip()).strip().endswith((";", "}"))


def place(source: str, bug: Bug) -> tuple[int, int]:
    """Where in `source` it is planted. Raises ValueError where its place is not there exactly once."""
    found = list(pattern(bug.old).finditer(source))
    if len(found) != 1:
        raise ValueError(f"{bug.name}: {bug.file} has its place {len(found)} times, wanted once:\n{bug.old}")
    return found[0].span(1)


def planted(source: str, bugs: list[tuple[int, Bug]]) -> str:
    """`source` with these numbered bugs. Those whose places overlap share one question, around all of them."""
    spans = sorted(((*place(source, bug), number, bug) for number, bug in bugs), key=lambda span: span[:3])
    groups: list[list] = []
    for span in spans:
        if groups and span[0] < max(end for _, end, *_ in groups[-1]):
            groups[-1].append(span)
        else:
            groups.append([span])
    for group in reversed(groups):
        start, end = group[0][0], max(end for _, end, *_ in group)
        text = right = source[start:end]
        for own_start, own_end, number, bug in group:
            wrong = source[start:own_start] + bug.new + source[own_end:end]
            asked = f"megakern::planted_bug == {number}"
            if is_statement(right):
                text = f"if ({asked}) {{ {wrong}\n}} else {{ {text}\n}}"
            else:
                text = f"({asked} ? ({wrong}) : ({text}))"
        source = source[:start] + text + source[end:]
    return source


def module(bugs: list[tuple[int, Bug]]) -> Path:
    """megakern._simt with these bugs, all of them asleep. Its other objects are those of `make simt`."""
    spec = importlib.util.spec_from_file_location("build_csrc", CSRC / "build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    others = builder.compile_sources("simt")
    places = [path for name in SOURCES for path in CSRC.glob(name)]
    texts = {str(path.relative_to(CSRC)): path.read_text() for path in places}
    texts = {file: planted(text, [b for b in bugs if b[1].file == file]) for file, text in texts.items()}
    texts["planted_bug.h"] = HEADER
    folder, objects = ROOT / "build" / "planted", list(others.rglob("*.o"))
    built, newest = folder / "_simt.so", max(path.stat().st_mtime for path in objects)
    same = all((folder / file).exists() and (folder / file).read_text() == text for file, text in texts.items())
    if same and built.exists() and built.stat().st_mtime > newest:
        return built
    shutil.rmtree(folder, ignore_errors=True)
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    flags = [*builder.CXX_FLAGS, "-DMEGAKERN_SIMT", "-pthread", "-w", "-Wno-psabi", "-include", "planted_bug.h"]
    sources = [file for file in texts if file.endswith(".cu")]
    compilers = [
        subprocess.Popen([builder.compiler(), *flags, "-x", "c++", "-c", file, "-o", f"{file}.o"], cwd=folder)
        for file in sources
    ]
    assert not any([compiler.wait() for compiler in compilers]), "a bug of the table is no C++"
    rest = [path for path in objects if path.name.removesuffix(".o") not in sources]
    words = [builder.compiler(), "-shared", "-pthread", *rest, *(f"{file}.o" for file in sources), "-o", built]
    subprocess.run(words, cwd=folder, check=True)
    return built


def outcome(number: int, tests: tuple[str, ...], built: Path) -> tuple[int, str]:
    """Run tests with bug `number` awake (0: none), up to the first that fails -> the exit code, and what they print."""
    assert "megakern" not in sys.modules, "its module of kernels would be in the forks too"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ |= {"PLANTED_BUG": str(number), "SIMT_MODULE": str(built)}
        os.close(read)
        signal.alarm(HANGS)
        text, code = io.StringIO(), 70
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-m", "not slow"]
                code = int(pytest.main([*options, *tests]))
        finally:
            with os.fdopen(write, "w") as pipe:
                pipe.write(text.getvalue()[-4000:])
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def uncaught(words: tuple[str, ...] = ()) -> list[str]:
    """The bugs (those whose name has one of the words) with which all tests passed; prints a line for each."""
    from tests import planted_attention, planted_product

    numbered = list(enumerate([*planted_attention.BUGS, *planted_product.BUGS], 1))
    built = module(numbered)
    chosen = [(i, bug) for i, bug in numbered if not words or any(word in bug.name for word in words)]
    code, text = outcome(0, tuple(dict.fromkeys(test for _, bug in chosen for test in bug.tests)), built)
    if code != 0:
        raise RuntimeError(f"with all bugs asleep the tests fail, and so prove nothing (exit code {code}):\n{text}")
    missed = []
    for number, bug in chosen:
        start = time.monotonic()
        code, text = outcome(number, bug.tests, built)
        found = code == FAILED or code < 0  # less than 0: ended by a signal
        if not found:
            missed.append(bug.name)
        last = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))] or text.splitlines()[-1:]
        by = last[0].removeprefix("FAILED tests/kernels/")[:150] if last else f"exit code {code}"
        seconds = time.monotonic() - start
        print(f"{'caught' if found else 'MISSED'} {bug.name:<70}{code:>4}{seconds:6.1f} s  {by}", flush=True)
    return missed


def main() -> int:
    missed = uncaught(tuple(sys.argv[1:]))
    print(f"{len(missed)} missed" + "".join(f"\n  {name}" for name in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
