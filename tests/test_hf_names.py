"""Rules between our tensors and theirs: any slice of one from slices of the other, both ways. No device needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakern.config import GPTConfig
from megakern.model.gpt import GPT
from megakern.model.hf.families import FAMILIES
from megakern.model.hf.names import Rule, rules_of, tensor_problems
from tests.test_hf_parity import grouped

LLAMA = {"width": 24, "heads": 6, "kv_heads": 2, "head_dim": 6, "ffn_size": 20, "vocab_size": 37, "vocab_multiple": 8,
         "sequence_length": 16, "layers": 2, "norm": "rmsnorm", "activation": "swiglu", "positions": "rope",
         "bias": False}  # fmt: skip
CONFIGS = {
    "gpt2": GPTConfig(layers=2, width=24, heads=4, vocab_size=37, vocab_multiple=8, sequence_length=16),
    "gpt2 without biases": GPTConfig(layers=1, width=24, heads=4, vocab_size=40, bias=False, tied_embeddings=False),
    "llama": GPTConfig(**LLAMA),
    "qwen2": GPTConfig(**LLAMA, qkv_bias=True, tied_embeddings=False),
    "qwen3": GPTConfig(**LLAMA, qk_norm=True),
}


def rules(name: str) -> list[Rule]:
    return rules_of(CONFIGS[name], FAMILIES[name.split()[0]])


@pytest.mark.parametrize("name", CONFIGS)
def test_there_is_a_rule_for_every_parameter(name):
    model = GPT(CONFIGS[name], device="meta")
    wanted = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    assert {rule.ours: rule.shape for rule in rules(name)} == wanted


def whole(rule: Rule, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ours from theirs, written another way than in the rule."""
    parts = [theirs[name] for name in rule.theirs]
    if rule.kind == "vocab":
        ours = torch.zeros(rule.shape)
        ours[: len(parts[0])] = parts[0]
        return ours
    if rule.kind in ("same", "turned"):
        return parts[0].t() if rule.kind == "turned" else parts[0]
    if rule.kind == "fused":
        parts = list((parts[0].t() if parts[0].ndim == 2 else parts[0]).chunk(3))
    return grouped(parts, len(parts[1]) // rule.group[1])


EVERY = [(name, number) for name in CONFIGS for number in range(len(rules(name)))]


@settings(max_examples=150, deadline=None)
@given(which=st.sampled_from(EVERY), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_slices_both_ways(which, cut):
    rule = rules(which[0])[which[1]]
    g = torch.Generator().manual_seed(which[1])
    theirs = {name: torch.randn(shape, generator=g) for name, shape in rule.theirs.items()}
    ours = whole(rule, theirs)
    assert tuple(ours.shape) == rule.shape

    def read_theirs(name, rows, columns):
        return theirs[name][rows] if columns is None else theirs[name][rows, columns]

    def read_ours(name, rows, columns):
        assert name == rule.ours
        return ours[rows] if columns is None else ours[rows, columns]

    def between(rows: int) -> tuple[int, int]:
        start, stop = sorted(int(each * rows) for each in cut)
        return min(start, rows - 1), max(stop, min(start, rows - 1) + 1)

    start, stop = between(rule.shape[0])
    assert torch.equal(rule.our_rows(read_theirs, start, stop), ours[start:stop])
    for name, tensor in theirs.items():
        start, stop = between(len(tensor))
        assert torch.equal(rule.their_rows(name, read_ours, start, stop), tensor[start:stop]), name


def test_problems_name_each_tensor():
    config = CONFIGS["llama"]
    shapes = {name: shape for rule in rules("llama") for name, shape in rule.theirs.items()}
    dtypes = dict.fromkeys(shapes, "float32")
    how = {"tied": config.tied_embeddings, "one_dtype": True}
    assert tensor_problems(rules("llama"), shapes, dtypes, **how) == []
    dtypes["model.norm.weight"] = "float16"
    (problem,) = tensor_problems(rules("llama"), shapes, dtypes, **how)
    assert problem.startswith("tensors of several dtypes: 1 are float16, as model.norm.weight; ")
    assert tensor_problems(rules("llama"), shapes, dtypes, tied=True, one_dtype=False) == []
