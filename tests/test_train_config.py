"""Settings of a run: TOML, overrides, errors. No device needed."""

from __future__ import annotations

import pytest

from megakern.config import ConfigError
from megakern.train.config import as_table, describe_settings, dump_config, load_config, parse_overrides, tomllib


@pytest.fixture
def toml(tmp_path):
    def write(text: str):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_file_preset_and_overrides_in_that_order(toml):
    path = toml('[model]\npreset = "demo"\nlayers = 3\n[train]\nsteps = 7\n[optimizer]\nlr = 1\n')
    config = load_config(path, ["--model.layers", "2", "--model.norm=rmsnorm", "--optimizer.beta2", "0.99"])
    assert (config.model.layers, config.model.width, config.model.norm) == (2, 512, "rmsnorm")
    assert (config.train.steps, config.optimizer.lr, config.optimizer.beta2) == (7, 1.0, 0.99)


def test_preset_from_the_command_line_replaces_the_files(toml):
    path = toml('[model]\npreset = "demo"\n')
    assert load_config(path, ["--model.preset", "tiny-llama"]).model.norm == "rmsnorm"


def test_saved_settings_give_the_same_run(toml, tmp_path):
    config = load_config(toml('[model]\npreset = "llama-3-8b"\n[train]\nmicro_batch = 4\n'))
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config
    assert tomllib.loads(dump_config(config)) == as_table(config)


def test_overrides_are_toml_values():
    words = ["--a.b", "3e-4", "--a.c=true", "--d.e", "text", "--d.f", '"7"', "--d.g.h", "1"]
    assert parse_overrides(words) == {"a": {"b": 3e-4, "c": True}, "d": {"e": "text", "f": "7", "g": {"h": 1}}}


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("[model]\nlayrs = 3\n", [], r"config.toml: unknown key 'model.layrs'; did you mean 'model.layers'\?"),
        ("[trian]\n", [], r"config.toml: unknown key 'trian'; did you mean 'train'\?"),
        ("", ["--train.step", "3"], r"command line: unknown key 'train.step'; did you mean 'train.steps'\?"),
        ("", ["--steps", "3"], r"'--steps' is not an option; .*; did you mean --train.steps\?"),
        ("", ["--train.steps"], "--train.steps needs a value"),
        ("[train]\nsteps = 0\n", [], "train.steps must be 1 or more, got 0"),
        ('[train]\nsteps = "many"\n', [], "train.steps must be int, got 'many'"),
        ("model = 3\n", [], "model must be a table, got 3"),
        ("[model\n", [], "not valid TOML"),
        ('[model]\npreset = "gpt2"\n', [], "gpt2-124m"),
        ("[model]\npreset = 3\n", [], "model.preset must be a name, got 3"),
        ("[train]\nbatch = 6\nmicro_batch = 4\n", [], "train.batch = 6 must be a multiple of train.micro_batch = 4"),
        ("[parallel]\noverlap_rows = -1\n", [], r"parallel.overlap_rows must be 0 \(never\) or more, got -1"),
        ('[train]\nrecompute_modules = ["moe"]\n', [], "train.recompute_modules must be some of attention, mlp, norm"),
        ('[train]\nprecision = "fp8"\n', [], "train.precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ('[train]\nmatmul_precision = "low"\n', [], "train.matmul_precision must be one of highest, high, medium, got"),
        ('[optimizer]\nschedule = "cos"\n', [], "optimizer.schedule must be one of"),
        ('[train]\non_save_error = "go"\n', [], "train.on_save_error must be one of stop, continue, got 'go'"),
        ("[optimizer]\nlr = -1.0\n", [], "optimizer.lr must be above 0"),
        ("[optimizer]\nbeta1 = 1.0\n", [], r"optimizer.beta1 must be in \[0, 1\)"),
        ("[parallel]\ntp = 0\n", [], "parallel.tp must be 1 or more"),
        ("[model]\nheads = 5\n", [], "model.width = 768 is not divisible by model.heads = 5"),
    ],
)
def test_wrong_settings_are_named(toml, text, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(toml(text), words)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no such configuration file"):
        load_config(tmp_path / "none.toml")


def test_every_setting_is_described():
    text = describe_settings()
    for line in text.splitlines():
        if line.startswith("  --"):
            assert len(line[4:].split(maxsplit=1)) == 2, f"no meaning given: {line}"
    assert "--train.max_skipped" in text
    assert "held-out" in text
