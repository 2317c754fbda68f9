"""Triton's interpreter, made a third faster for the tests: what it computes stays as it is."""

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
