"""Configuration: frozen keyword-only dataclasses, checked when made, read from TOML tables with nothing ignored."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from typing import Any

import dacite


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range. The message is one sentence for the user."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def from_table(cls: type, table: dict[str, Any], source: str) -> Any:
    """Make the dataclass `cls` from a nested dict as TOML or JSON gives it.

    Raises ConfigError that names `source` and the key: an unknown key (with the nearest known one), a wrong type, a bad
    value.
    """
    refuse_unknown(cls, table, source)
    try:
        return dacite.from_dict(cls, table, dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number}))
    except dacite.MissingValueError as error:
        raise ConfigError(f"{source}: {error.field_path} is missing") from error
    except dacite.WrongTypeError as error:
        wanted = getattr(error.field_type, "__name__", str(error.field_type))
        raise ConfigError(f"{source}: {error.field_path} must be {wanted}, got {error.value!r}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def refuse_unknown(cls: type, table: dict[str, Any], source: str, prefix: str = "") -> None:
    """Raises ConfigError for the first key of `table` that `cls` does not have, with the nearest one it has."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    sections = dacite_sections(cls)
    for key, value in table.items():
        if key not in fields:
            leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known_keys(cls, prefix))}  # outer ones win
            near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.5)
            hint = f"; did you mean {leaves[near[0]]!r}?" if near else f"; known here: {', '.join(sorted(fields))}"
            raise ConfigError(f"{source}: unknown key {prefix + key!r}{hint}")
        if key in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix + key} must be a table, got {value!r}")
            refuse_unknown(sections[key], value, source, f"{prefix}{key}.")


def dacite_sections(cls: type) -> dict[str, type]:
    """The fields of `cls` that are dataclasses themselves (also `Section | None`), by name."""
    sections = {}
    for name, hint in typing.get_type_hints(cls).items():
        for candidate in (hint, *typing.get_args(hint)):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                sections[name] = candidate
    return sections


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below `cls`."""
    sections = dacite_sections(cls)
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        if field.name in sections:
            keys.extend(known_keys(sections[field.name], f"{prefix}{field.name}."))
    return keys


NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu_squared", "swiglu")
POSITIONS = ("learned", "rope", "none")
RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_MODULES = ("attention", "mlp", "norm")
RECOMPUTE_DEFAULT = ("attention", "norm")  # what costs little to compute again


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rope wavelengths for longer texts, as Llama 3.1 does it (`rope_type` "llama3") or linearly."""

    kind: str = "linear"
    """"linear" (every position divided by `factor`) or "llama3"."""
    factor: float = 1.0
    """How many times longer than the original length."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / high_freq_factor stay."""
    original_length: int = 8192
    """llama3: the sequence length before stretching, in tokens."""

    def __post_init__(self) -> None:
        require(self.kind in ("linear", "llama3"), f"rope_scaling.kind must be linear or llama3, got {self.kind!r}")
        require(self.factor >= 1, f"rope_scaling.factor must be 1 or more, got {self.factor}")
        require(
            self.original_length >= 1, f"rope_scaling.original_length must be 1 or more, got {self.original_length}"
        )
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling needs 0 < low_freq_factor < high_freq_factor, "
            f"got {self.low_freq_factor}, {self.high_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a decoder-only transformer. Sizes are whole-model sizes, whatever the parallel layout."""

    layers: int = 12
    """Number of transformer blocks."""
    width: int = 768
    """Size of the residual stream, C."""
    heads: int = 12
    """Query heads, H."""
    kv_heads: int | None = None
    """Key and value heads; divides `heads`. None: as many as `heads`."""
    head_dim: int | None = None
    """Size of one head, D. None: width / heads."""
    ffn_size: int | None = None
    """Inner size of the MLP. None: 4 x width."""
    vocab_size: int = 50257
    """Number of token ids, V."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this, whatever the layout; padding never counts in the loss."""
    sequence_length: int = 1024
    """Longest sequence, T, in tokens."""
    norm: str = "layernorm"
    """layernorm or rmsnorm."""
    norm_eps: float = 1e-5
    """Added to the variance (or mean square) in the norms."""
    activation: str = "gelu_tanh"
    """gelu, gelu_tanh, relu_squared, or swiglu (gated, three matrices)."""
    positions: str = "learned"
    """learned (a table), rope (rotary), or none."""
    rope_base: float = 10000.0
    """Base of the rope wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Stretching of rope for longer texts."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """A bias of queries, keys and values alone (Qwen2). None: as `bias`."""
    qk_norm: bool = False
    """An RMSNorm of each query and key head before rope."""
    tied_embeddings: bool = True
    """The output head is the token embedding."""
    parallel_residual: bool = False
    """Attention and MLP read the same normed input and are added together (GPT-J, GPT-NeoX)."""
    dropout: float = 0.0
    """Probability of zeroing, in [0, 1): embedding, attention probabilities, and each branch's output."""
    window: int | None = None
    """A token attends to itself and this many tokens before it. None: to the start."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections have init_std / sqrt(2 layers)."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocab_size", "vocab_multiple", "sequence_length"):
            require(getattr(self, name) >= 1, f"model.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("kv_heads", "head_dim", "ffn_size", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} must be 1 or more, got {value}")
        require(
            self.head_dim is not None or self.width % self.heads == 0,
            f"model.width = {self.width} is not divisible by model.heads = {self.heads}; "
            f"change one, or set model.head_dim",
        )
        require(
            self.heads % self.key_value_heads == 0,
            f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.key_value_heads}",
        )
        for name, allowed in (("norm", NORMS), ("activation", ACTIVATIONS), ("positions", POSITIONS)):
            value = getattr(self, name)
            require(value in allowed, f"model.{name} must be one of {', '.join(allowed)}, got {value!r}")
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), got {self.dropout}")
        require(self.norm_eps > 0, f"model.norm_eps must be above 0, got {self.norm_eps}")
        require(self.init_std > 0, f"model.init_std must be above 0, got {self.init_std}")
        if self.positions == "rope":
            require(self.size_of_head % 2 == 0, f"rope needs an even head size, got {self.size_of_head}")
            require(self.rope_base > 1, f"model.rope_base must be above 1, got {self.rope_base}")
        else:
            require(self.rope_scaling is None, f"model.rope_scaling needs positions = 'rope', got {self.positions!r}")

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size_of_head(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def size_of_ffn(self) -> int:
        return 4 * self.width if self.ffn_size is None else self.ffn_size

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises ConfigError when the model cannot be split over `tp` ranks."""
        for what, size in (
            ("kv_heads", self.key_value_heads),
            ("ffn_size", self.size_of_ffn),
            ("padded vocab_size", self.padded_vocab_size),
        ):
            require(size % tp == 0, f"model.{what} = {size} is not divisible by parallel.tp = {tp}; choose another tp")
