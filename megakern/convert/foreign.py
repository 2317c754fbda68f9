"""Checkpoints of nanoGPT (`ckpt.pt`) and llm.c (`model.bin`): GPT-2 shapes, read as if they were Hugging Face's.

nanoGPT's file is a pickle. It is opened by torch.load(weights_only=True) alone, which makes tensors, numbers and plain
containers and calls nothing that the file names; there is no other way behind it. llm.c's file has a fixed layout:
every field of its header is checked, and its size must be that of its tensors, to the byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megakern.config import ConfigError, GPTConfig
from megakern.model.hf.families import FAMILIES, LIMITS, Imported, to_config_json
from megakern.model.hf.names import ALL

MAGIC = 20240326
VERSIONS = {3: ("float32", np.float32), 5: ("bfloat16", np.int16)}
_TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass
class Tensors:
    """Tensors under GPT-2's names and in its layout; matrices are stored the other way round and turned when read."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    _stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, stored: torch.Tensor) -> None:
        tensor = stored.t() if name.endswith(_TURNED) and stored.ndim == 2 else stored
        self.shapes[name], self.dtypes[name] = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self._stored[name] = tensor

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        return self._stored[name][rows, columns or ALL] if self._stored[name].ndim > 1 else self._stored[name][rows]

    def close(self) -> None:
        self._stored.clear()


def _understood(config: GPTConfig) -> Imported:
    family = FAMILIES["gpt2"]
    table = to_config_json(config, family, "float32", {"bos_token_id": None, "eos_token_id": None})
    used = {key: value for key, value in table.items() if key not in ("architectures", "model_type", "dtype")}
    del used["torch_dtype"]
    return Imported(family, config, used)


# --- llm.c ---


def is_llmc(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_llmc(path: Path) -> tuple[Imported, Tensors]:
    """Raises ConfigError that lists everything wrong with the file."""
    size = path.stat().st_size
    head = np.fromfile(path, dtype="<i4", count=256)
    if len(head) < 256 or head[0] != MAGIC:
        raise ConfigError(f"{path}: not a model of llm.c: it must begin with 256 numbers, the first of them {MAGIC}")
    version, T, V, L, heads, C, P = (int(value) for value in head[1:8])
    problems = [] if version in VERSIONS else [f"version must be 3 (fp32) or 5 (bf16), got {version}"]
    for what, value, limit in (
        ("sequence length", T, LIMITS["size"]), ("vocabulary", V, LIMITS["size"]), ("layers", L, LIMITS["layers"]),
        ("heads", heads, LIMITS["size"]), ("channels", C, LIMITS["size"]), ("padded vocabulary", P, LIMITS["size"]),
    ):  # fmt: skip
        if not 1 <= value <= limit:
            problems.append(f"{what} must be from 1 to {limit}, got {value}")
    if P < V:
        problems.append(f"the padded vocabulary {P} is less than the vocabulary {V}")
    if heads >= 1 and C % heads:
        problems.append(f"{C} channels are not divisible by {heads} heads")
    if head[8:].any():
        problems.append(f"number {8 + int(head[8:].argmax())} of the header is not 0; its meaning is not known here")
    order = _llmc_order(T, V, L, C, P)
    dtype, stored = VERSIONS.get(version, VERSIONS[3])
    wanted = 1024 + sum(math.prod(shape) for _, shape in order) * np.dtype(stored).itemsize
    if not problems and size != wanted:
        problems.append(f"a model of this shape has {wanted} bytes, the file has {size}")
    if problems:
        raise ConfigError(f"{path} cannot be converted, nothing was written:\n  " + "\n  ".join(problems))
    data = torch.from_numpy(np.memmap(path, dtype=stored, mode="c", offset=1024)).view(getattr(torch, dtype))
    tensors, position = Tensors(), 0
    for name, shape in order:
        whole = data[position : position + math.prod(shape)].view(shape)
        position += whole.numel()
        if name.startswith("h."):
            for i in range(L):
                tensors.add(f"transformer.h.{i}{name[1:]}", whole[i])
        else:
            tensors.add(f"transformer.{name}", whole[:V] if name == "wte.weight" else whole)
    config = GPTConfig(
        layers=L, width=C, heads=heads, vocab_size=V, sequence_length=T, activation="gelu_tanh", norm_eps=1e-5
    )
    return _understood(config), tensors


def _llmc_order(T: int, V: int, L: int, C: int, P: int) -> list[tuple[str, tuple[int, ...]]]:
    """Each tensor of all layers at once, in the file's order."""
    return [
        ("wte.weight", (P, C)), ("wpe.weight", (T, C)),
        ("h.ln_1.weight", (L, C)), ("h.ln_1.bias", (L, C)),
        ("h.attn.c_attn.weight", (L, 3 * C, C)), ("h.attn.c_attn.bias", (L, 3 * C)),
        ("h.attn.c_proj.weight", (L, C, C)), ("h.attn.c_proj.bias", (L, C)),
        ("h.ln_2.weight", (L, C)), ("h.ln_2.bias", (L, C)),
        ("h.mlp.c_fc.weight", (L, 4 * C, C)), ("h.mlp.c_fc.bias", (L, 4 * C)),
        ("h.mlp.c_proj.weight", (L, C, 4 * C)), ("h.mlp.c_proj.bias", (L, C)),
        ("ln_f.weight", (C,)), ("ln_f.bias", (C,)),
    ]  # fmt: skip


# --- nanoGPT ---

_ARGUMENTS = {"n_layer": int, "n_head": int, "n_embd": int, "block_size": int, "vocab_size": int, "bias": bool,
              "dropout": (int, float)}  # fmt: skip


def read_nanogpt(path: Path) -> tuple[Imported, Tensors]:
    """Raises ConfigError: not such a file, or one that holds more than tensors, numbers and plain containers."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # an older, bare pickle is not opened at all
            raise ConfigError(
                f"{path}: neither a zip file, as torch.save writes nanoGPT's checkpoints, nor one of llm.c"
            )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, torch.serialization.pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{path}: not readable as tensors and numbers alone ({reason}); a file that needs more can run code, and "
            f"is never opened in another way"
        ) from error
    arguments = saved.get("model_args") if isinstance(saved, dict) else None
    state = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise ConfigError(f"{path}: not a checkpoint of nanoGPT: it must be a table with model and model_args")
    problems = [f"model_args: unknown key {key!r}" for key in sorted(map(str, set(arguments) - set(_ARGUMENTS)))]
    for key, kind in _ARGUMENTS.items():
        value = arguments.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problems.append(f"model_args: {key} must be there and a number or true or false, got {value!r}")
        elif kind is int and not 1 <= value <= (LIMITS["layers"] if key == "n_layer" else LIMITS["size"]):
            problems.append(f"model_args: {key} must be from 1 to {LIMITS['size']}, got {value}")
    tensors = Tensors()
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"model: {name!r} must be the name of a tensor")
        else:
            tensors.add(name.removeprefix("_orig_mod."), value.detach())  # torch.compile adds this
    if not problems:
        config = _nanogpt_config(arguments, problems)
    if problems:
        raise ConfigError(f"{path} cannot be converted, nothing was written:\n  " + "\n  ".join(problems))
    return _understood(config), tensors


def _nanogpt_config(arguments: dict[str, Any], problems: list[str]) -> GPTConfig | None:
    try:
        return GPTConfig(
            layers=arguments["n_layer"], width=arguments["n_embd"], heads=arguments["n_head"],
            vocab_size=arguments["vocab_size"], sequence_length=arguments["block_size"], bias=arguments["bias"],
            dropout=float(arguments["dropout"]), activation="gelu",
        )  # fmt: skip
    except ConfigError as error:
        problems.append(str(error))
        return None
