"""What a run starts from: the weights of another run, and with `lora` the adapters on top, which alone are saved.

An adapter run's checkpoints name the checkpoint below them by folder and SHA-256 of its manifest; it must be there, and
the same, whenever the run is loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from megakern.config import ConfigError, require
from megakern.data.chat import CHAT_FILES
from megakern.data.files import sha256_of_file
from megakern.data.tokenizer import Tokenizer
from megakern.layers.lora import adapter_names, merge_adapters
from megakern.model.gpt import GPT
from megakern.ops.adamw import AdamW
from megakern.parallel.blocks import local_of
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.build import adapt, start_masters
from megakern.train.config import LoraConfig, RunConfig, as_table, base_run, dump_config, load_config
from megakern.train.files import write_atomic
from megakern.train.machine import DTYPES


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run starts from."""

    path: Path
    sha256: str
    """Of its manifest, which has the hashes of all its files."""

    def state(self) -> dict[str, str]:
        """As an adapter run's checkpoints name it: no local paths."""
        return {"checkpoint": self.path.name, "sha256": self.sha256}

    @classmethod
    def of(cls, config: RunConfig) -> Base:
        """Raises CheckpointError: it is gone, or damaged."""
        path = Path(config.train.init_from)
        checkpoint.read_manifest(path)
        return cls(path, sha256_of_file(path / "manifest.json"))


def find_base(config: RunConfig, tokenizer: Tokenizer) -> str:
    """`train.init_from` as the checkpoint that it means: itself, or the newest sound one of the run it names.

    Raises ConfigError: no such run, an adapter run, another tokenizer. CheckpointError: no sound checkpoint.
    """
    named = Path(config.train.init_from)
    run = base_run(named)
    if not (run / "config.toml").exists():
        raise ConfigError(
            f"train.init_from = {str(named)!r} is neither a run nor a checkpoint of one; name a folder that "
            f"`megakern train` or `megakern convert` made"
        )
    require(
        load_config(run / "config.toml").lora.rank == 0,
        f"train.init_from = {str(named)!r} is a run of adapters; make a whole model of it first: "
        f"megakern ckpt merge-lora {run} --out NEW",
    )
    found = Tokenizer.load(run / "tokenizer.json").sha256
    require(
        found == tokenizer.sha256,
        f"train.init_from = {named} has another tokenizer ({found[:12]}) than the data ({tokenizer.sha256[:12]}): "
        f"the same ids mean other text; prepare the data again with: --tokenizer {run / 'tokenizer.json'}",
    )
    return str((checkpoint.newest(run / "ckpt") if named == run else named).resolve())


def start(model: GPT, optimizer: AdamW, config: RunConfig) -> None:
    """Weights of a run without a checkpoint of its own: those of `train.init_from`, or the initial ones.

    Weights of another floating dtype are cast; masters start from what was saved, not from its rounding.
    """
    if not config.train.init_from:
        start_masters(model, optimizer, config)
        return
    adapters = adapter_names(model)
    parameters = {name: value for name, value in model.named_parameters() if name not in adapters}
    path = Path(config.train.init_from)
    if model.parallel.world_rank == 0:
        print(f"starts from the weights of {path}", flush=True)
    if config.optimizer.master == "none" or adapters:
        load_base(model, path)
        start_masters(model, optimizer, config)
        return
    wide = {
        f"model.{name}": torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
        for name, parameter in parameters.items()
    }
    checkpoint.load(path, wide, model.parallel, cast=True, only="model.")
    for parameter, value in zip(parameters.values(), wide.values(), strict=True):
        optimizer.set_master(parameter, local_of(value))


def require_optimizer(path: Path) -> None:
    """Raises CheckpointError when the checkpoint has weights alone: a converted or merged run, which cannot go on."""
    if not any(name.startswith("optimizer.") for name in checkpoint.read_manifest(path).tensors):
        raise checkpoint.CheckpointError(
            f"{path} has weights alone (converted, or merged), so there is no training to resume; start a new run from "
            f"it: megakern train CONFIG.toml --train.init_from {path.parent.parent} --out NEW"
        )


def load_base(model: GPT, path: Path) -> dict:
    """All parameters but the adapters', from the checkpoint at `path`, whatever layout or dtype saved it."""
    adapters = adapter_names(model)
    tensors = {f"model.{name}": value for name, value in model.named_parameters() if name not in adapters}
    return checkpoint.load(path, tensors, model.parallel, cast=True, only="model.")


def check_base(state: dict, base: Base, path: Path) -> None:
    """Raises CheckpointError when the adapters saved in `state` at `path` were trained on another base."""
    wanted = state.get("base") or {}
    name, sha256 = wanted.get("checkpoint"), str(wanted.get("sha256"))
    if sha256 != base.sha256:
        raise checkpoint.CheckpointError(
            f"the adapters of {path} belong to {name} of hash {sha256[:12]}, but "
            f"{base.path} has {base.sha256[:12]}; name the right one with train.init_from in the run's config.toml"
        )


def load_model(model: GPT, config: RunConfig, path: Path) -> dict:
    """Fill `model`, made without adapters, with the weights of the run's checkpoint at `path`; returns its state.

    Adapters are merged into the weights. Raises CheckpointError.
    """
    if not config.lora.rank:
        tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        return checkpoint.load(path, tensors, model.parallel, only="model.")
    base = Base.of(config)
    adapt(model, config.lora)
    load_base(model, base.path)
    names = adapter_names(model)
    tensors = {f"model.{name}": value for name, value in model.named_parameters() if name in names}
    state = checkpoint.load(path, tensors, model.parallel, only="model.")
    check_base(state, base, path)
    merge_adapters(model)
    return state


def merge_run(run: Path, out: Path) -> str:
    """Makes the run `out` of the adapter run `run`: its newest weights with the adapters merged; returns what was done.

    Whatever uses a run takes it, and needs the base no longer. Raises ConfigError: `run` has no adapters, `out` exists.
    """
    config = load_config(run / "config.toml")
    require(config.lora.rank > 0, f"{run} has no adapters to merge: its lora.rank is 0")
    require(not out.exists(), f"{out} exists already, and is not overwritten; name another --out, or remove it")
    path = checkpoint.newest(run / "ckpt")
    model = GPT(config.model, device="cpu", dtype=DTYPES[config.parameter_precision])
    state = load_model(model, config, path)
    whole = dataclasses.replace(config, lora=LoraConfig(), train=dataclasses.replace(config.train, init_from=""))
    state = {key: value for key, value in state.items() if key != "base"}
    state["config"] = {name: part for name, part in as_table(whole).items() if name != "data"}
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    (out / "ckpt").mkdir(parents=True)
    saved = checkpoint.save(out / "ckpt", state["step"], tensors, state, ParallelContext())
    for name in ("tokenizer.json", *CHAT_FILES):
        if (run / name).exists():
            write_atomic(out / name, (run / name).read_bytes())
    write_atomic(out / "config.toml", dump_config(whole).encode())  # last: now it is a run
    return f"merged the adapters of {path} into {saved}"
