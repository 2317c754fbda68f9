"""Triton's interpreter for the tests: a third faster, and noting which kernels ran. What it computes stays as it is."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


class _Nothing:
    @staticmethod
    def restore() -> None:
        pass


def replace_once() -> None:
    """At each call of one jitted function by another, `tl.sum` too, the interpreter goes through all of triton.language
    to put its own functions there: 0.7 ms, though they are there already. Let it look at one of them before."""
    replace = interpreter._patch_lang

    def if_needed(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return _Nothing
        return replace(fn)

    interpreter._patch_lang = if_needed


def note_kernels(file: str) -> None:
    """Append the name of each kernel to `file` when this process runs it first."""
    run, seen = interpreter.InterpretedFunction.run, set()

    def noted(self, *arguments, **options):
        name = self.fn.__name__
        if name not in seen:
            seen.add(name)
            with open(file, "a") as notes:
                notes.write(f"{name}\n")
        return run(self, *arguments, **options)

    interpreter.InterpretedFunction.run = noted
