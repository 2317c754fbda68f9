"""The classes of swapped modules, made on first use: each has the name of the class that it derives from.

So names in `config.architectures`, in Hugging Face's tables and in `print(model)` stay what they were, and a pickle
finds the class here.
"""

from __future__ import annotations

import sys

from megakern.patching import swapped
from megakern.patching.families import ENTRIES

_ENTRIES = {entry.name: entry for entry in ENTRIES if entry.mixin}


def __getattr__(name: str) -> type:
    if name not in _ENTRIES:
        raise AttributeError(f"module {__name__} has no class {name!r}; it has {', '.join(_ENTRIES)}")
    entry = _ENTRIES[name]
    original, mixin = entry.load(), getattr(swapped, entry.mixin)
    made = type(original)(name, (mixin, original), {"__module__": __name__, "__qualname__": name})
    made._unpatched = original
    setattr(sys.modules[__name__], name, made)
    return made


def swap(module, options: swapped.Options) -> None:
    """Give `module` the class made for its own, and `options`."""
    module.__class__ = getattr(sys.modules[__name__], type(module).__name__)
    module._megakern = options


def is_swapped(module) -> bool:
    return type(module).__module__ == __name__


def restore(module) -> None:
    """Undo `swap`."""
    if is_swapped(module):
        module.__class__ = type(module)._unpatched
    module.__dict__.pop("_megakern", None)
