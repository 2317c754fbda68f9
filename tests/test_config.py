"""GPTConfig's ranges and derived sizes, and reading dataclasses from tables. No device needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from megakern.config import ConfigError, GPTConfig, RopeScaling, from_table, known_keys


@dataclass(frozen=True, kw_only=True)
class Run:
    model: GPTConfig = field(default_factory=GPTConfig)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    name: str


def test_derived_sizes():
    plain = GPTConfig(width=96, heads=6)
    assert (plain.key_value_heads, plain.size_of_head, plain.size_of_ffn) == (6, 16, 384)
    chosen = GPTConfig(width=96, heads=6, kv_heads=2, head_dim=32, ffn_size=100)
    assert (chosen.key_value_heads, chosen.size_of_head, chosen.size_of_ffn) == (2, 32, 100)
    assert [
        GPTConfig(vocab_size=v, vocab_multiple=m).padded_vocab_size for v, m in [(1, 1), (128, 128), (129, 128)]
    ] == [
        1,
        128,
        256,
    ]


def test_from_table_reads_nested_tables_and_widens_integers():
    table = {"name": "a", "lr": 1, "betas": [0.8, 0.9], "model": {"layers": 3, "positions": "rope", "rope_scaling": {}}}
    run = from_table(Run, table, "run.toml")
    assert run == Run(
        name="a", lr=1.0, betas=(0.8, 0.9), model=GPTConfig(layers=3, positions="rope", rope_scaling=RopeScaling())
    )
    assert isinstance(run.lr, float) and isinstance(run.betas, tuple)


def test_a_config_survives_the_way_through_a_table():
    config = GPTConfig(positions="rope", rope_scaling=RopeScaling(kind="llama3", factor=8.0), kv_heads=4, qkv_bias=True)
    assert from_table(GPTConfig, dataclasses.asdict(config), "saved") == config


def test_known_keys_are_dotted():
    keys = known_keys(Run)
    assert {"lr", "model", "model.layers", "model.rope_scaling.factor"} <= set(keys)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"nmae": "a"}, "run.toml: unknown key 'nmae'; did you mean 'name'"),
        ({"name": "a", "layers": 3}, "unknown key 'layers'; did you mean 'model.layers'"),
        ({"name": "a", "model": {"layer": 3}}, "unknown key 'model.layer'; did you mean 'model.layers'"),
        ({"name": "a", "model": {"rope_scaling": {"fctor": 1}}}, "'model.rope_scaling.fctor'; did you mean"),
        ({"name": "a", "model": {"zzzz": 3}}, "unknown key 'model.zzzz'; known here: activation, bias"),
        ({"name": "a", "model": 3}, "run.toml: model must be a table, got 3"),
        ({}, "run.toml: name is missing"),
        ({"name": "a", "lr": "fast"}, "run.toml: lr must be float, got 'fast'"),
        ({"name": "a", "model": {"layers": 1.5}}, "run.toml: model.layers must be int, got 1.5"),
        ({"name": "a", "model": {"layers": 0}}, "run.toml: model.layers must be 1 or more, got 0"),
    ],
)
def test_wrong_tables_are_named(table, message):
    with pytest.raises(ConfigError, match=message):
        from_table(Run, table, "run.toml")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"layers": 0}, "model.layers must be 1 or more, got 0"),
        ({"vocab_multiple": 0}, "model.vocab_multiple must be 1 or more, got 0"),
        ({"window": 0}, "model.window must be 1 or more, got 0"),
        ({"kv_heads": 0}, "model.kv_heads must be 1 or more, got 0"),
        ({"width": 100, "heads": 3}, "model.width = 100 is not divisible by model.heads = 3; change one, or set"),
        ({"heads": 12, "kv_heads": 5}, "model.heads = 12 is not divisible by model.kv_heads = 5"),
        ({"norm": "batchnorm"}, "model.norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
        ({"activation": "relu"}, "model.activation must be one of gelu, gelu_tanh, relu_squared, swiglu, got 'relu'"),
        ({"positions": "alibi"}, "model.positions must be one of learned, rope, none, got 'alibi'"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps must be above 0, got 0.0"),
        ({"init_std": 0.0}, "model.init_std must be above 0, got 0.0"),
        ({"positions": "rope", "width": 9, "heads": 3}, "rope needs an even head size, got 3"),
        ({"positions": "rope", "rope_base": 1.0}, "model.rope_base must be above 1, got 1.0"),
        ({"rope_scaling": RopeScaling()}, "model.rope_scaling needs positions = 'rope', got 'learned'"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "yarn"}, "rope_scaling.kind must be linear or llama3, got 'yarn'"),
        ({"factor": 0.5}, "rope_scaling.factor must be 1 or more, got 0.5"),
        ({"original_length": 0}, "rope_scaling.original_length must be 1 or more, got 0"),
        ({"low_freq_factor": 4.0}, "rope_scaling needs 0 < low_freq_factor < high_freq_factor, got 4.0, 4.0"),
    ],
)
def test_rope_scaling_out_of_range_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kv_heads": 2}, "model.kv_heads = 2 is not divisible by parallel.tp = 4"),
        ({"heads": 6, "width": 96}, "model.kv_heads = 6 is not divisible by parallel.tp = 4"),
        ({"ffn_size": 30}, "model.ffn_size = 30 is not divisible by parallel.tp = 4"),
        ({"vocab_size": 9, "vocab_multiple": 3}, "model.padded vocab_size = 9 is not divisible by parallel.tp = 4"),
    ],
)
def test_models_that_cannot_be_split_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**values).check_tensor_parallel(4)
    GPTConfig(**values).check_tensor_parallel(1)
