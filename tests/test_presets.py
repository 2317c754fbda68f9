"""The named shapes against published parameter counts, on the meta device; two gloo ranks for local shapes."""

from __future__ import annotations

import pytest

import megakern as mk
from megakern.config import ConfigError
from megakern.model.gpt import parameter_count

# From the models' own files and pages (logical counts, without padding rows).
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameter_count(mk.presets[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["megatron-1.2b", "megatron-2.5b", "megatron-4.2b", "megatron-8.3b", "gpt3-175b"])
def test_counts_follow_the_formula_of_the_papers(name):
    config = mk.presets[name]
    L, h, V, s = config.layers, config.width, config.vocab_size, config.sequence_length
    # arXiv 2104.04473, equation 2, leaves out the final norm (2 h).
    paper = 12 * L * h**2 * (1 + 13 / (12 * h) + (V + s) / (12 * L * h)) + 2 * h
    assert parameter_count(config) == round(paper)
    billions = float(name.rsplit("-", 1)[1][:-1])
    assert parameter_count(config) / 1e9 == pytest.approx(billions, rel=0.011)


def test_padding_rows_count_only_when_asked():
    config = mk.presets["tiny-llama"]  # untied, 250 of 256 rows
    model = mk.GPT(config, device="meta")
    assert parameter_count(model, padding=True) - parameter_count(model) == 2 * 6 * 64
    assert parameter_count(config, padding=True) == sum(p.numel() for p in model.parameters())
    tied = mk.presets["tiny-gpt2"]
    assert parameter_count(tied, padding=True) - parameter_count(tied) == 6 * 64


def test_small_presets():
    assert parameter_count(mk.presets["demo"]) == 10_488_576
    assert parameter_count(mk.presets["tiny-gpt2"]) < 150_000
    assert parameter_count(mk.presets["tiny-llama"]) < 150_000


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'gpt2-124'; did you mean 'gpt2-124m'"):
        mk.presets["gpt2-124"]
    with pytest.raises(ConfigError, match="unknown preset 'xyzzy'; the presets are tiny-gpt2, "):
        mk.presets["xyzzy"]


def local_shapes(name: str) -> tuple:
    context = mk.ParallelContext.create(tp=2)
    model = mk.GPT(mk.presets[name], context, device="meta")
    shapes = {key: tuple(parameter.to_local().shape) for key, parameter in model.named_parameters()}
    return shapes, parameter_count(model)


def test_shapes_of_two_ranks(ranks):
    for name in ("gpt2-124m", "llama-3-8b"):
        (shapes, count), (other, _) = ranks.run(local_shapes, 2, name)
        assert shapes == other and count == PUBLISHED[name]
        C = mk.presets[name].width
        assert shapes["blocks.0.norm1.weight"] == (C,)
        if name == "gpt2-124m":
            assert shapes["embedding.weight"] == (50304 // 2, C) and shapes["positions.weight"] == (1024, C)
            assert shapes["blocks.11.mlp.fc1.weight"] == (2 * C, C) and shapes["blocks.11.mlp.fc2.weight"] == (C, 2 * C)
            assert shapes["blocks.11.mlp.fc1.bias"] == (2 * C,) and shapes["blocks.11.mlp.fc2.bias"] == (C,)
        else:
            assert shapes["head.weight"] == (128256 // 2, C)
            assert shapes["blocks.0.attention.qkv.weight"] == ((32 + 2 * 8) * 128 // 2, C)
            assert shapes["blocks.0.attention.proj.weight"] == (C, 4096 // 2)
            assert shapes["blocks.0.mlp.gate.weight"] == shapes["blocks.0.mlp.up.weight"] == (14336 // 2, C)
