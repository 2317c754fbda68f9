"""Budgets of machine code as committed JSON: what each kernel may need on each architecture, and who exceeds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Needs = dict[str, dict[str, dict[str, object]]]
"""Architecture ("sm_90") -> kernel -> what it needs, by name."""


def write(path: Path, compiler: str, version: str, needs: Needs) -> None:
    """Without its compiler's version a budget means nothing. One line a kernel, so that git shows what changed."""
    lines = ",\n".join(
        f' "{arch}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(n)}" for k, n in kernels.items()) + "\n }"
        for arch, kernels in needs.items()
    )
    path.write_text(f'{{"{compiler}": "{version}", "kernels": {{\n{lines}\n}}}}\n')


def outcome(options, path: Path, count: int, *, update: Callable, complaints: Callable, show: Callable) -> int:
    """What --update, --check or neither does with `count` kernels that were compiled -> the exit code."""
    if options.update:
        update()
        print(f"{path}: {count} kernels")
    elif options.check:
        found = complaints(json.loads(path.read_text()))
        print("\n".join(found) or f"{count} compiled kernels keep to the budget")
        return 1 if found else 0
    else:
        show()
    return 0


def complaints(budget: dict, compiler: str, version: str, needs: Needs, partial: bool = False) -> list[str]:
    """Why `needs` do not keep to the budget; empty when they do. partial: not all of its kernels were looked at.

    A number may not rise, anything else may not change, and no kernel may be unknown or gone.
    """
    if budget[compiler] != version:
        return [f"the budget is for {compiler} {budget[compiler]}, this is {version}: install that one"]
    found = []
    for arch, kernels in needs.items():
        allowed = budget["kernels"].get(arch, {})
        for kernel, need in kernels.items():
            if kernel not in allowed:
                found.append(f"{arch} {kernel}: not in the budget; add it with --update")
                continue
            for what, value in need.items():
                before = allowed[kernel][what]
                if isinstance(value, str) and value != before:
                    found.append(f"{arch} {kernel}: {what.replace('_', ' ')} {value!r}, was {before!r}")
                elif not isinstance(value, str) and value > before:
                    found.append(f"{arch} {kernel}: {what} rose from {before} to {value}")
        if not partial:
            found += [f"{arch} {name}: in the budget, but gone; --update" for name in sorted(allowed.keys() - kernels)]
    return found
