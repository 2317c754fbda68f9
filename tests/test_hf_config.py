"""config.json of strangers: each key is used, checked or refused, and older forms mean the same. No device needed."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakern.config import ConfigError, GPTConfig, RopeScaling
from megakern.model.gpt import parameter_count
from megakern.model.hf.families import FAMILIES, family_of, from_config_json, same_function, to_config_json
from megakern.model.presets import presets
from tests.hf_models import MODELS, transformers

GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 2, "vocab_size": 300, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
QWEN2, QWEN3, MISTRAL = ({**LLAMA, "model_type": name} for name in ("qwen2", "qwen3", "mistral"))
# As the Hub has them: gpt2, Llama-2-7b-hf, Llama-3.1-8B, Mistral-7B-v0.1, Qwen2-0.5B, Qwen3-8B, SmolLM2-135M.
HUB = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
    "llama2": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "llama3.1": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    },
}  # fmt: skip


def understood(table: dict) -> GPTConfig:
    imported, problems = from_config_json(table)
    assert problems == []
    return imported.config


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub(name):
    config = understood(HUB[name])
    size = {"gpt2": 124_439_808, "llama2": 6_738_415_616, "llama3.1": 8_030_261_248, "mistral": 7_241_732_096,
            "qwen2": 494_032_768, "qwen3": 8_190_735_360, "smollm2": 134_515_008}[name]  # fmt: skip
    assert parameter_count(config) == size, "the number that the model's page gives"
    if name == "llama3.1":
        assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_length=8192)
    assert config.window == (4095 if name == "mistral" else None)


def test_presets_are_those_of_the_hub():
    assert same_function(understood(HUB["gpt2"]), presets["gpt2-124m"])
    assert same_function(understood(HUB["qwen3"]), presets["qwen3-8b"])
    with_scaling = {**HUB["llama3.1"], "rope_scaling": None, "max_position_embeddings": 8192}
    assert same_function(understood(with_scaling), presets["llama-3-8b"])


def test_older_and_newer_forms_of_rope_are_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    both = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}, **new}
    assert understood(new) == understood(old) == understood(both)
    assert understood({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == RopeScaling(
        kind="linear", factor=2.0
    )
    assert understood(LLAMA).rope_scaling is None and understood(LLAMA).rope_base == 10000.0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_what_may_be_left_out_is_what_transformers_takes(family):
    """A config with the sizes alone, read by both."""
    table = {**GPT2} if family == "gpt2" else {**LLAMA, "model_type": family, "num_attention_heads": 32}
    if family != "gpt2":
        table["hidden_size"] = 320
    theirs = transformers.AutoConfig.for_model(**table).to_dict()
    whole = {key: value for key, value in theirs.items() if key != "transformers_version"}
    assert same_function(understood(table), understood(whole))


@pytest.mark.parametrize("name", MODELS)
def test_ours_and_back(name):
    family, keys = MODELS[name]
    theirs = json.loads(getattr(transformers, f"{family}Config")(**keys).to_json_string())
    config = understood(theirs)
    written = to_config_json(config, family_of(config, theirs["model_type"]), "float32", {})
    assert same_function(understood(written), config)
    assert written["model_type"] == theirs["model_type"]
    again = getattr(transformers, f"{family}Config")(**{k: v for k, v in written.items() if k != "model_type"})
    assert same_function(understood(json.loads(again.to_json_string())), config), "as transformers reads it"


BAD = [
    ([], "must hold a JSON object, got list"),
    ({**LLAMA, "model_type": "mixtral"}, "model_type = 'mixtral' is not one of gpt2, llama"),
    ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, r"architectures must be \['LlamaForCausalLM'\]"),
    ({**LLAMA, "auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to be run; no code"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantized weights are not read"),
    ({**LLAMA, "logit_scale": 2.0}, "unknown key 'logit_scale' = 2.0; what it does"),
    ({**LLAMA, "use_cache": "yes"}, "use_cache must be bool, got 'yes'"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
    ({**LLAMA, "attention_bias": True}, "attention_bias = True is not supported"),
    ({**LLAMA, "mlp_bias": True}, "mlp_bias = True is not supported"),
    ({**LLAMA, "is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
    ({**LLAMA, "hidden_size": "48"}, "hidden_size must be a whole number from 1 to 16777216, got '48'"),
    ({**LLAMA, "hidden_size": True}, "hidden_size must be a whole number"),
    ({**LLAMA, "vocab_size": 2**40}, "vocab_size must be a whole number from 1 to"),
    ({**LLAMA, "num_hidden_layers": 5000}, "num_hidden_layers must be a whole number from 1 to 4096"),
    ({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, "intermediate_size is missing"),
    ({**LLAMA, "rms_norm_eps": -1}, r"rms_norm_eps must be a number in \[1e-12, 1\), got -1"),
    ({**LLAMA, "num_key_value_heads": 4}, "model.heads = 6 is not divisible by model.kv_heads = 4"),
    ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported, only"),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor, low_freq_factor, original"),
    ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"factor must be a number in \[1, 1e\+06\)"),
    ({**LLAMA, "rope_scaling": {"rope_type": "linear", "type": "llama3"}}, "'linear' and type 'llama3' disagree"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "unknown key 'beta' = 1"),
    ({**LLAMA, "rope_scaling": 2.0}, "rope_scaling must be an object or null, got 2.0"),
    ({**LLAMA, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta = 5.0 and that of rope_"),
    ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "disagree"),
    ({**LLAMA, "sliding_window": 5}, "unknown key 'sliding_window'"),
    ({**LLAMA, "tie_word_embeddings": 1}, "tie_word_embeddings = 1 is not supported, only True or False"),
    ({**MISTRAL, "num_key_value_heads": 2, "sliding_window": 1}, "sliding_window = 1 is not supported"),
    ({**MISTRAL, "num_key_value_heads": 2, "sliding_window": 0}, "sliding_window must be a whole number from 1"),
    ({**QWEN2, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
     "layers with and without a sliding window are not supported"),
    ({**QWEN2, "num_key_value_heads": 2, "layer_types": ["full_attention", "sliding_attention"]}, "with and without"),
    ({**QWEN2, "num_key_value_heads": 2, "layer_types": ["linear_attention"] * 2}, "layer_types must be a list of"),
    ({**QWEN2, "num_key_value_heads": 2, "max_window_layers": None}, "max_window_layers must be a whole number, 0"),
    ({**QWEN2, "num_key_value_heads": 2, "attention_bias": False}, "attention_bias = False is not supported"),
    ({**QWEN3, "num_key_value_heads": 2, "head_dim": 7}, "rope needs an even head size, got 7"),
    ({**GPT2, "activation_function": "relu"}, "activation_function = 'relu' is not supported, only 'gelu'"),
    ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
    ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
    ({**GPT2, "add_cross_attention": True}, "add_cross_attention = True is not supported"),
    ({**GPT2, "n_ctx": 32}, "n_ctx = 32 must be n_positions = 64"),
    ({**GPT2, "n_head": 7}, "model.width = 48 is not divisible by model.heads = 7"),
    ({**GPT2, "resid_pdrop": 1.5}, r"resid_pdrop must be a number in \[0, 1\), got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize("table, message", BAD)
def test_refused(table, message):
    imported, problems = from_config_json(table)
    assert imported is None
    assert re.search(message, "\n".join(problems)), problems


def test_all_that_is_wrong_is_listed_once():
    _, problems = from_config_json({**LLAMA, "hidden_act": "relu", "vocab_size": 0, "foo": 1, "mlp_bias": True})
    assert len(problems) == 4
    assert all(problem.startswith("config.json: ") for problem in problems)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([1, 2, 0.5, "", "x", "llama3"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=4,
)
KEYS = sorted({*GPT2, *(key for table in HUB.values() for key in table), "layer_types", "rope_parameters"})


@settings(max_examples=200, deadline=None)
@given(table=st.sampled_from([GPT2, *HUB.values()]), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_whatever_is_in_it_the_answer_is_a_config_or_problems(table, changes):
    imported, problems = from_config_json(table | changes)
    assert (imported is None) == bool(problems)
    assert imported is None or isinstance(imported.config, GPTConfig)


def test_only_keys_that_were_understood_go_on():
    table = {**LLAMA, "_attn_implementation": "hub/kernel", "_name_or_path": "/home/someone", "use_cache": True}
    imported, _ = from_config_json(table)
    assert set(imported.used) == {key for key in LLAMA if key != "model_type"}


def test_dropout_is_taken_over_where_it_is_one_number():
    assert understood({**GPT2, "attn_pdrop": 0.1}).dropout == 0.1
    assert understood({**GPT2, "attn_pdrop": 0.2}).dropout == 0.0


@pytest.mark.parametrize("name", [name for name in presets if name != "demo"])
def test_every_preset_but_the_demo_has_a_family(name):
    wanted = next((family for family in ("llama", "qwen3") if family in name), "gpt2")
    assert family_of(presets[name]).name == wanted


def test_a_shape_that_no_family_has_is_refused_with_every_setting():
    with pytest.raises(ConfigError, match=r"nearest is qwen3, .*\n  model.activation = 'relu_squared' \(a qwen3 has s"):
        family_of(presets["demo"])
    odd = dataclasses.replace(presets["tiny-gpt2"], parallel_residual=True, window=4)
    with pytest.raises(ConfigError, match=r"nearest is gpt2") as error:
        family_of(odd)
    assert "model.window = 4" in str(error.value) and "model.parallel_residual = True" in str(error.value)
    both = dataclasses.replace(presets["tiny-llama"], qkv_bias=True, qk_norm=True)
    with pytest.raises(ConfigError, match=r"model\.q(kv_bias|k_norm) = True"):
        family_of(both)


def test_the_plainest_family_that_fits_or_the_one_it_came_from():
    config = presets["tiny-llama"]
    assert family_of(config).name == "llama"
    assert family_of(config, "mistral").name == "mistral"
    assert family_of(dataclasses.replace(config, qkv_bias=True), "llama").name == "qwen2"
    assert set(FAMILIES) == {"gpt2", "llama", "mistral", "qwen2", "qwen3"}
