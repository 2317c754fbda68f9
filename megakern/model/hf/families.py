"""config.json of Hugging Face to `GPTConfig` and back: GPT-2, Llama, Mistral, Qwen2, Qwen3.

Every key of a config.json is one of three kinds: used; known to change nothing, and its value checked; or refused. What
a key that nobody here knows would do to the model is unknown, so it is never passed over.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megakern.config import ConfigError, GPTConfig, RopeScaling

LIMITS = {"layers": 2**12, "size": 2**24}
"""Largest number of layers and largest width, vocabulary or length that is read, so that no number from a file can make
this process allocate without bound."""

ROWS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What a `model_type` of transformers means here."""

    name: str
    """`model_type`."""
    architecture: str
    """The class of transformers that it is loaded with."""
    prefix: str
    """Of tensor names; a base model's own file lacks it."""
    defaults: dict[str, Any]
    """What transformers takes for keys that a config.json may leave out, where that is not the same for all."""


_LLAMA = {"kv_heads": None, "head_dim": None, "window": None}
FAMILIES = {
    family.name: family
    for family in (
        Family("gpt2", "GPT2LMHeadModel", "transformer.", {}),
        Family("llama", "LlamaForCausalLM", "model.", _LLAMA),
        Family("mistral", "MistralForCausalLM", "model.", {**_LLAMA, "kv_heads": 8, "window": 4096}),
        Family("qwen2", "Qwen2ForCausalLM", "model.", {**_LLAMA, "kv_heads": 32}),
        Family("qwen3", "Qwen3ForCausalLM", "model.", {**_LLAMA, "kv_heads": 32, "head_dim": 128}),
    )
}


@dataclass(frozen=True)
class Imported:
    """A config.json that was understood."""

    family: Family
    config: GPTConfig
    used: dict[str, Any]
    """The keys that decide what the model computes: all that is ever given to transformers."""


# --- reading ---

_FLAG = (bool,)
_TEXT = (str, type(None))
_IDS = (int, list, type(None))
# Keys that change nothing of what the model computes, with the types that they may have.
HARMLESS: dict[str, tuple[type, ...]] = {
    "_name_or_path": _TEXT,
    "transformers_version": _TEXT,
    "torch_dtype": _TEXT,  # the tensors have a dtype of their own
    "dtype": _TEXT,
    "tokenizer_class": _TEXT,  # the tokenizer is made from its own file alone
    "use_cache": _FLAG,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "return_dict": _FLAG,
    "gradient_checkpointing": _FLAG,
    "_attn_implementation": _TEXT,  # never passed on
    "_attn_implementation_autoset": _FLAG,
    "bos_token_id": _IDS,
    "eos_token_id": _IDS,  # read with the tokenizer
    "pad_token_id": _IDS,
    "id2label": (dict,),
    "label2id": (dict,),
    "task_specific_params": (dict, type(None)),
    "pretraining_tp": (int,),  # the order of a sum
    "is_llama_config": _FLAG,
    "transformers.js_config": (dict,),
    "unsloth_fixed": _FLAG,
    "unsloth_version": _TEXT,
}
_HARMLESS_GPT2 = {
    **HARMLESS,
    **{f"summary_{name}": (str, bool, float, int, type(None)) for name in (
        "activation", "first_dropout", "proj_to_labels", "type", "use_proj"
    )},
}  # fmt: skip
# Keys that may have one value only, for the others would change what is computed.
FIXED = {
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "problem_type": None, "is_decoder": False,
    "rope_interleaved": False, "torchscript": False, "pruned_heads": {},
}  # fmt: skip


class _Keys:
    """Takes the keys of a table one by one and collects everything that is wrong with them."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self.table, self.where = table, where
        self.problems: list[str] = []
        self.used: dict[str, Any] = {}
        self._rest = dict(table)

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.where}: {text}")

    def whole(self, key: str, default: Any = ..., *, null: bool = False, limit: int = LIMITS["size"]) -> Any:
        """A whole number from 1 to `limit`, or null where that is allowed or the default."""
        value = self._take(key, default)
        right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit
        if right or (value is None and (null or default is None)):
            return value
        if default is not ... or key in self.used:
            self.problem(f"{key} must be a whole number from 1 to {limit}, got {value!r}")
        return 1

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number with low <= it < high."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            self.problem(f"{key} must be a number in [{low:g}, {high:g}), got {value!r}")
            return default
        return float(value)

    def choice(self, key: str, default: Any, *allowed: Any) -> Any:
        value = self._take(key, default)
        if not any(type(value) is type(each) and value == each for each in allowed):
            self.problem(f"{key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}")
            return default
        return value

    def harmless(self, known: dict[str, tuple[type, ...]]) -> None:
        for key, kinds in known.items():
            if key in self._rest and not isinstance(value := self._rest.pop(key), kinds):
                self.problem(f"{key} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it is, for the caller to check."""
        return self._take(key, default)

    def refuse_rest(self) -> None:
        for key in sorted(self._rest):
            if key == "auto_map":
                self.problem("auto_map names code to be run; no code from a model folder is ever run")
            elif key == "quantization_config":
                self.problem("quantization_config: quantized weights are not read; convert the full-precision model")
            else:
                self.problem(f"unknown key {key!r} = {self._rest[key]!r}; what it does to the model is not known here")

    def _take(self, key: str, default: Any) -> Any:
        if key in self.table:
            self.used[key] = self.table[key]
            self._rest.pop(key, None)
            return self.table[key]
        if default is ...:
            self.problem(f"{key} is missing")
            return 1
        return default


def from_config_json(table: Any, where: str = "config.json") -> tuple[Imported | None, list[str]]:
    """(what the table means, everything wrong with it): nothing is guessed, so the first is None if there is any."""
    if not isinstance(table, dict):
        return None, [f"{where}: must hold a JSON object, got {type(table).__name__}"]
    known = ", ".join(FAMILIES)
    family = FAMILIES.get(table["model_type"]) if isinstance(table.get("model_type"), str) else None
    if family is None:
        return None, [f"{where}: model_type = {table.get('model_type')!r} is not one of {known}"]
    keys = _Keys({key: value for key, value in table.items() if key != "model_type"}, where)
    architectures = keys.raw("architectures")
    if architectures not in (None, [family.architecture], [_base_architecture(family)]):
        keys.problem(f"architectures must be [{family.architecture!r}], got {architectures!r}")
    settings = _gpt2(keys) if family.name == "gpt2" else _llama(keys, family)
    for key, value in FIXED.items():
        keys.choice(key, value, value)
    keys.harmless(_HARMLESS_GPT2 if family.name == "gpt2" else HARMLESS)
    keys.refuse_rest()
    config = None
    try:
        config = GPTConfig(**settings)
    except ConfigError as error:
        keys.problem(str(error))
    if keys.problems or config is None:
        return None, keys.problems
    used = {key: value for key, value in keys.used.items() if key != "architectures" and key not in FIXED}
    return Imported(family, config, used), []


def _base_architecture(family: Family) -> str:
    return family.architecture.replace("ForCausalLM", "Model").replace("LMHead", "")


def _gpt2(keys: _Keys) -> dict[str, Any]:
    positions, width = keys.whole("n_positions", 1024), keys.whole("n_embd")
    if keys.raw("n_ctx", positions) != positions:
        keys.problem(f"n_ctx = {keys.table['n_ctx']!r} must be n_positions = {positions}")
    keys.choice("scale_attn_weights", True, True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        keys.choice(name, False, False)
    drops = {keys.number(name, 0.1, 0, 1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return {
        "layers": keys.whole("n_layer", limit=LIMITS["layers"]),
        "width": width,
        "heads": keys.whole("n_head"),
        "ffn_size": keys.whole("n_inner", None),
        "vocab_size": keys.whole("vocab_size"),
        "sequence_length": positions,
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5, 1e-12, 1),
        "activation": ROWS[keys.choice("activation_function", "gelu_new", *ROWS)],
        "tied_embeddings": keys.choice("tie_word_embeddings", True, True, False),
        "init_std": keys.number("initializer_range", 0.02, 1e-6, 10),
        # Ours has one rate for all places. It only matters to further training, so three different ones become none.
        "dropout": drops.pop() if len(drops) == 1 else 0.0,
    }


def _llama(keys: _Keys, family: Family) -> dict[str, Any]:
    heads, layers = keys.whole("num_attention_heads"), keys.whole("num_hidden_layers", limit=LIMITS["layers"])
    keys.choice("hidden_act", "silu", "silu")
    keys.choice("attention_bias", family.name == "qwen2", family.name == "qwen2")
    keys.choice("mlp_bias", False, False)
    keys.number("attention_dropout", 0.0, 0, 1)  # ours drops in other places too, so it is not taken over
    base, scaling = _rope(keys)
    return {
        "layers": layers,
        "width": keys.whole("hidden_size"),
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", family.defaults["kv_heads"]),
        "head_dim": keys.whole("head_dim", family.defaults["head_dim"]),
        "ffn_size": keys.whole("intermediate_size"),
        "vocab_size": keys.whole("vocab_size"),
        "sequence_length": keys.whole("max_position_embeddings"),
        "norm": "rmsnorm",
        "norm_eps": keys.number("rms_norm_eps", 1e-6, 1e-12, 1),
        "activation": "swiglu",
        "positions": "rope",
        "rope_base": base,
        "rope_scaling": scaling,
        "bias": False,
        "qkv_bias": True if family.name == "qwen2" else None,
        "qk_norm": family.name == "qwen3",
        "tied_embeddings": keys.choice("tie_word_embeddings", False, True, False),
        "window": _window(keys, family, layers),
        "init_std": keys.number("initializer_range", 0.02, 1e-6, 10),
    }


def _window(keys: _Keys, family: Family, layers: int) -> int | None:
    """Ours does not count the token itself, theirs does."""
    if family.name == "llama":
        return None
    sliding = keys.whole("sliding_window", family.defaults["window"], null=True)
    if family.name.startswith("qwen") and not _slides(keys, layers):
        return None
    if sliding == 1:
        keys.problem("sliding_window = 1 is not supported: a token would see itself alone")
        return None
    return None if sliding is None else sliding - 1


def _slides(keys: _Keys, layers: int) -> bool:
    """Whether all layers of a Qwen have the window. From layer `max_window_layers` on they do, or as listed."""
    uses, first = keys.choice("use_sliding_window", False, True, False), keys.raw("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        keys.problem(f"max_window_layers must be a whole number, 0 or more, got {first!r}")
        return False
    kinds = keys.raw("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers if uses else 0)]
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        keys.problem(f"layer_types must be a list of full_attention and sliding_attention, got {kinds!r}")
        return False
    if len(set(kinds)) > 1 or (uses and len(kinds) != layers):
        keys.problem(f"layers with and without a sliding window are not supported: {len(kinds)} of {layers} listed")
    return uses and "sliding_attention" in kinds


_THETA = (1.0001, 1e12)
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """(base, scaling): from `rope_parameters`, or as older files have it from `rope_theta` and `rope_scaling`."""
    outer, old, new = keys.raw("rope_theta"), keys.raw("rope_scaling"), keys.raw("rope_parameters")
    if outer is not None:
        outer = keys.number("rope_theta", 10000.0, *_THETA)
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, (dict, type(None))):
            keys.problem(f"{name} must be an object or null, got {value!r}")
            return 10000.0, None
    if old and new and {**new, "rope_theta": None} != {**old, "rope_theta": None}:
        keys.problem(f"rope_scaling {old!r} and rope_parameters {new!r} disagree")
    parts = _Keys(dict(new or old or {}), f"{keys.where}: rope_parameters" if new else f"{keys.where}: rope_scaling")
    kind, kind_again = parts.raw("rope_type"), parts.raw("type")
    if kind and kind_again and kind != kind_again:
        parts.problem(f"rope_type {kind!r} and type {kind_again!r} disagree")
    kind = kind or kind_again or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        parts.problem(f"rope_type {kind!r} is not supported, only {', '.join(_ROPE_KEYS)}")
        keys.problems += parts.problems
        return 10000.0, None
    theta = parts.number("rope_theta", 10000.0 if outer is None else outer, *_THETA)
    if outer is not None and outer != theta:
        keys.problem(f"rope_theta = {outer!r} and that of rope_parameters = {theta!r} disagree")
    parts.choice("partial_rotary_factor", 1.0, 1.0, 1)
    missing = sorted(_ROPE_KEYS[kind] - set(parts.table))
    if missing:
        parts.problem(f"{', '.join(missing)} missing, which rope_type {kind!r} needs")
    values = {
        "factor": parts.number("factor", 1.0, 1, 1e6) if "factor" in _ROPE_KEYS[kind] else 1.0,
    }
    if kind == "llama3":
        values["low_freq_factor"] = parts.number("low_freq_factor", 1.0, 1e-6, 1e6)
        values["high_freq_factor"] = parts.number("high_freq_factor", 4.0, 1e-6, 1e6)
        values["original_length"] = parts.whole("original_max_position_embeddings", 8192)
    parts.refuse_rest()
    keys.problems += parts.problems
    if kind == "default" or parts.problems:
        return theta, None
    try:
        return theta, RopeScaling(kind=kind, **values)
    except ConfigError as error:
        keys.problem(str(error))
        return theta, None


# --- writing ---


def _misfits(config: GPTConfig, family: Family) -> list[str]:
    """Settings of `config` that models of `family` cannot have."""
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    even = config.width % config.heads == 0 and config.size_of_head == config.width // config.heads
    if family.name == "gpt2":
        wanted = {
            "norm": ("layernorm",), "activation": ("gelu", "gelu_tanh"), "positions": ("learned",), "bias": (True,),
            "qk_norm": (False,), "window": (None,), "parallel_residual": (False,),
            "kv_heads": (None, config.heads), "head_dim": (config.size_of_head if even else None,),
            "qkv_bias": (None, True),
        }  # fmt: skip
    else:
        wanted = {
            "norm": ("rmsnorm",), "activation": ("swiglu",), "positions": ("rope",), "bias": (False,),
            "qk_norm": (family.name == "qwen3",), "parallel_residual": (False,),
        }  # fmt: skip
        if qkv_bias != (family.name == "qwen2"):
            wanted["qkv_bias"] = ("on",) if family.name == "qwen2" else ("off",)
        if family.name == "llama":
            wanted["window"] = (None,)
    found = []
    for name, allowed in wanted.items():
        value = config.size_of_head if name == "head_dim" else getattr(config, name)
        if value not in allowed:
            found.append(f"model.{name} = {value!r} (a {family.name} has {' or '.join(map(str, allowed))})")
    return found


def family_of(config: GPTConfig, prefer: str | None = None) -> Family:
    """The family that `config` is exported as: `prefer` where it fits, else the plainest that does.

    Raises ConfigError that names every setting which the nearest family does not have.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.name != prefer)
    misfits = {family.name: _misfits(config, family) for family in order}
    nearest = min(order, key=lambda family: len(misfits[family.name]))
    if misfits[nearest.name]:
        raise ConfigError(
            f"no family of Hugging Face models that megakern writes ({', '.join(FAMILIES)}) has this model's shape. "
            f"The nearest is {nearest.name}, from which it differs in:\n  " + "\n  ".join(misfits[nearest.name])
        )
    return nearest


def to_config_json(config: GPTConfig, family: Family, dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """config.json of `config` as a model of `family`. dtype: "float32" ...; tokens: bos_token_id and eos_token_id."""
    table: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name}
    # `torch_dtype` for transformers 4, which does not know `dtype`.
    table |= {"dtype": dtype, "torch_dtype": dtype, "initializer_range": config.init_std, **tokens}
    table |= {"tie_word_embeddings": config.tied_embeddings, "vocab_size": config.vocab_size, "use_cache": True}
    if family.name == "gpt2":
        back = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        return table | drops | {
            "n_positions": config.sequence_length, "n_embd": config.width, "n_layer": config.layers,
            "n_head": config.heads, "n_inner": config.ffn_size, "layer_norm_epsilon": config.norm_eps,
            "activation_function": back[config.activation],
        }  # fmt: skip
    table |= {
        "hidden_size": config.width, "intermediate_size": config.size_of_ffn, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.key_value_heads,
        "head_dim": config.size_of_head, "max_position_embeddings": config.sequence_length, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "attention_dropout": 0.0,
        **_rope_json(config),
    }  # fmt: skip
    window = None if config.window is None else config.window + 1
    if family.name == "mistral":
        table["sliding_window"] = window
    elif family.name.startswith("qwen"):
        table |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    if family.name in ("llama", "qwen3"):
        table["attention_bias"] = False
    if family.name == "llama":
        table["mlp_bias"] = False
    return table


def _rope_json(config: GPTConfig) -> dict[str, Any]:
    """Both forms: transformers 5 reads rope_parameters, older ones rope_theta and rope_scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default"}
    else:
        parameters = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            parameters |= {
                "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }  # fmt: skip
    return {
        "rope_theta": config.rope_base,
        "rope_scaling": None if scaling is None else parameters,
        "rope_parameters": {**parameters, "rope_theta": config.rope_base},
    }


def same_function(a: GPTConfig, b: GPTConfig) -> bool:
    """Whether two configs describe the same computation; what only matters to training is left out."""

    def plain(config: GPTConfig) -> GPTConfig:
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        return dataclasses.replace(
            config, kv_heads=config.key_value_heads, head_dim=config.size_of_head, ffn_size=config.size_of_ffn,
            qkv_bias=qkv_bias, dropout=0.0, init_std=1.0, vocab_multiple=1,
        )  # fmt: skip

    return plain(a) == plain(b)
