"""FLOPs a token against hand formulas and PyTorch's own counter. No device needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import megakern as mk
from benchmarks.peers.plain_gpt import PlainGPT
from megakern.config import ConfigError, GPTConfig
from megakern.model.flops import attention_flops_per_token, flops_per_token


@pytest.mark.parametrize("name", ["gpt2-124m", "megatron-8.3b"])
def test_gpt_formula_of_the_megatron_papers(name):
    config = mk.presets[name]
    L, h, V, s = config.layers, config.width, config.vocab_size, config.sequence_length
    # arXiv 2205.05198, equation 7, over B s tokens: attention in full.
    assert flops_per_token(config, causal=False) == pytest.approx(
        72 * L * h**2 * (1 + s / (6 * h) + V / (12 * h * L)), rel=1e-12
    )
    assert flops_per_token(config, causal=False) - flops_per_token(config, causal=True) == 6 * L * h * s


def test_llama_3_8b_matches_both_published_counts():
    config = mk.presets["llama-3-8b"]
    assert flops_per_token(config, causal=False) / 1e9 == pytest.approx(57.9, abs=0.05)  # NVIDIA NeMo 24.12
    assert flops_per_token(config, causal=True) / 1e9 == pytest.approx(51.5, abs=0.05)  # NVIDIA Megatron-Bridge 25.11


def test_a_shorter_sequence_costs_less_attention_only():
    config = mk.presets["demo"]
    long, short = (flops_per_token(config, s, causal=True) for s in (256, 128))
    assert long - short == 6 * 2 * 512 * 128


def test_window_counts_the_keys_that_are_seen():
    s, window = 64, 10
    config = GPTConfig(layers=2, width=32, heads=2, sequence_length=s, window=window)
    assert attention_flops_per_token(config, causal=False) == 12 * 2 * 32 * (window + 1)
    # Counted one by one; the formula takes the area, which has half of the diagonal.
    seen = sum(min(query, window) + 0.5 for query in range(s)) / s
    area = attention_flops_per_token(config, causal=True) / (12 * 2 * 32)
    assert area == pytest.approx(seen, abs=0.51)
    wide = dataclasses.replace(config, window=1000)
    assert attention_flops_per_token(wide, causal=True) == 6 * 2 * 32 * s


def test_matmuls_match_pytorchs_counter():
    V, T, B = 96, 16, 2
    model = PlainGPT(layers=2, width=48, heads=4, vocab_size=V, sequence_length=T)
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    config = GPTConfig(layers=2, width=48, heads=4, vocab_size=V, sequence_length=T)
    ours = flops_per_token(config, causal=False) - attention_flops_per_token(config, causal=False)
    assert matmuls == ours * B * T


def test_a_wrong_length_is_named():
    with pytest.raises(ConfigError, match="sequence_length must be 1 or more, got 0"):
        flops_per_token(mk.presets["demo"], 0, causal=True)
