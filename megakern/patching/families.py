"""Which Hugging Face classes can be swapped, and for what: a table of names, so that nothing is imported or guessed.

A module is swapped when its class is exactly one of these. A subclass may compute something else in its `forward`, so
it is left alone and named in the report.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One class of Hugging Face or PyTorch, and the class of `swapped.py` whose `forward` comes before its own."""

    home: str
    """The module that defines it."""
    name: str
    part: str
    """What `patch` calls it: norm, activation, rope, attention, loss; or base, a model's body, which stays as it is."""
    mixin: str = ""
    """In `swapped.py`."""

    def load(self) -> type:
        return getattr(importlib.import_module(self.home), self.name)


def _decoder(family: str, prefix: str, attention: str = "WindowedAttention") -> list[Entry]:
    home = f"transformers.models.{family}.modeling_{family}"
    return [
        Entry(home, f"{prefix}RMSNorm", "norm", "RMSNorm"),
        Entry(home, f"{prefix}MLP", "activation", "GatedMLP"),
        Entry(home, f"{prefix}RotaryEmbedding", "rope", "Rotary"),
        Entry(home, f"{prefix}Attention", "attention", attention),
        Entry(home, f"{prefix}Model", "base"),
        Entry(home, f"{prefix}ForCausalLM", "loss", "CausalLM"),
    ]


_GPT2 = "transformers.models.gpt2.modeling_gpt2"
_ACTIVATIONS = "transformers.activations"

ENTRIES = [
    *_decoder("llama", "Llama", "RotaryAttention"),
    *_decoder("qwen2", "Qwen2"),
    *_decoder("qwen3", "Qwen3"),
    *_decoder("mistral", "Mistral", "MistralAttention"),
    Entry("torch.nn.modules.normalization", "LayerNorm", "norm", "LayerNorm"),
    Entry(_ACTIVATIONS, "NewGELUActivation", "activation", "TanhGELU"),
    Entry(_ACTIVATIONS, "GELUTanh", "activation", "TanhGELU"),
    Entry(_ACTIVATIONS, "GELUActivation", "activation", "ExactGELU"),
    Entry(_GPT2, "GPT2Attention", "attention"),
    Entry(_GPT2, "GPT2Model", "base"),
    Entry(_GPT2, "GPT2LMHeadModel", "loss", "GPT2CausalLM"),
]
FAMILIES = "Llama, Qwen2, Qwen3, Mistral and GPT-2"
PARTS = ("norm", "activation", "rope", "attention", "loss")

_BY_NAME = {(entry.home, entry.name): entry for entry in ENTRIES}


def entry_of(kind: type) -> Entry | None:
    """The entry of exactly this class."""
    entry = _BY_NAME.get((kind.__module__, kind.__name__))
    return entry if entry is not None and entry.load() is kind else None


def parent_entry(kind: type) -> Entry | None:
    """The entry of this class or of the nearest class that it derives from, PyTorch's own aside."""
    for parent in kind.__mro__:
        entry = entry_of(parent)
        if entry is not None and (parent is kind or entry.home.startswith("transformers")):
            return entry
    return None
