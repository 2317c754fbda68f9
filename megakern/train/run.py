"""A run's folder: made from settings that have all been checked, or opened again.

RUN/config.toml   every setting, resolved        RUN/metrics.jsonl   each step and evaluation
RUN/tokenizer.json                               RUN/curve.png, RUN/summary.json   at the end
RUN/ckpt/         checkpoints
of conversations also chat_template.jinja, special_tokens.json, generation.json
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megakern.config import ConfigError, from_table, require
from megakern.data.chat import CHAT_FILES
from megakern.data.loader import check_vocabulary
from megakern.data.manifest import PreparedData
from megakern.data.packing import PackedRows
from megakern.data.tokenizer import Tokenizer
from megakern.layers.lora import mask_blocks
from megakern.train import machine
from megakern.train.batches import make_loader
from megakern.train.checkpoint_load import by_age
from megakern.train.config import ParallelConfig, RunConfig, dump_config, load_config
from megakern.train.files import RunInUseError, RunLock, write_atomic
from megakern.train.processes import apart
from megakern.train.start import find_base
from megakern.train.state_bytes import state_bytes


@dataclass(frozen=True)
class NewRun:
    """A run that is checked and not yet made. `create` makes its folder."""

    config: RunConfig
    run: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes to the folder within the block. Raises ConfigError: in use, or it cannot be made."""
        lock = RunLock(self.run)
        try:
            lock.__enter__()
        except RunInUseError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {self.run}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.__exit__()

    def create(self) -> None:
        try:
            (self.run / "ckpt").mkdir(parents=True, exist_ok=True)
            data = PreparedData(self.config.data.path)
            data.tokenizer.save(self.run / "tokenizer.json")
            for name in CHAT_FILES if data.template else ():
                write_atomic(self.run / name, (data.folder / name).read_bytes())
            # Last: a folder with config.toml is a complete run folder.
            write_atomic(self.run / "config.toml", dump_config(self.config).encode())
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {self.run}: {error.strerror}") from error


def check_run(config: RunConfig, nproc: int, *, rank: int = 0) -> RunConfig:
    """Everything that can be wrong is found here, before any worker starts; returns the resolved settings.

    `rank`: of a world that was joined; the first one alone says which precision was chosen, and all take what it wrote.
    Raises ConfigError, or DataError for unusable data.
    """
    parallel = config.parallel.over(nproc)
    config.model.check_tensor_parallel(parallel.tp)
    config.train.rows(parallel.dp)
    if config.lora.rank and config.lora.dropout:
        model = config.model
        for target, site, columns in (
            ("proj", "proj", model.heads * model.size_of_head),
            ("fc", "fc2", model.size_of_ffn),
        ):
            if target in config.lora.targets:
                mask_blocks(site, columns, parallel.tp)
    tokens = config.model.sequence_length
    require(
        not parallel.sequence_parallel or tokens % parallel.tp == 0,
        f"model.sequence_length = {tokens} is not divisible by parallel.tp = {parallel.tp}, which "
        f"parallel.sequence_parallel needs; change one of the three",
    )
    require(bool(config.data.path), "data.path is not set; name a folder that `megakern prepare` made")
    data = PreparedData(config.data.path)
    vocabulary = data.tokenizer.vocab_size
    require(
        config.model.vocab_size >= vocabulary,
        f"model.vocab_size = {config.model.vocab_size} is less than the vocabulary of {config.data.path}: {vocabulary}",
    )
    # Seconds at most: later tokens are checked as they are read.
    check_vocabulary(data.train, config.model.vocab_size, limit=100_000_000)
    # Refuses data shorter than one sample, and conversations that are too long.
    make_loader(data, config.model.sequence_length, config.train.seed)
    if data.template:
        PackedRows(data.validation, data.answers("validation"), config.model.sequence_length)
    _check_memory(config, parallel, nproc)
    precision = config.train.precision
    if precision == "auto":
        # Not in this process: after a multiplication on several threads it could not fork its workers.
        precision, reason = apart(lambda: machine.choose_precision(torch.device(machine.device_type())))
        if rank == 0:
            print(f"precision {precision}: {reason}", flush=True)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(Path(config.data.path).resolve())),
        parallel=parallel,
        train=dataclasses.replace(config.train, precision=precision),
    )


def _check_memory(config: RunConfig, parallel: ParallelConfig, nproc: int) -> None:
    """Raises ConfigError where the states alone, without activations, are more than a machine without GPUs has: its
    system would kill the processes minutes later, or others beside them. A GPU says itself what does not fit."""
    if machine.device_type() != "cpu":
        return
    layout = {"tp": parallel.tp, "dp": parallel.dp, "replicas": parallel.replicas}
    states = state_bytes(config.model, config.optimizer, **layout)
    local = min(nproc, int(os.environ.get("LOCAL_WORLD_SIZE", str(nproc))))
    each = states.weight if config.lora.rank else states.each
    wanted, found = local * each * states.parameters, machine.memory()
    require(
        wanted <= found,
        f"the training states take {wanted / 2**30:,.1f} GiB here ({each} bytes for each of {states.parameters:,} "
        f"parameters of a process, {local} of them), and this machine has {found / 2**30:,.1f} GiB; take a smaller "
        f"model, more machines (parallel.tp, parallel.dp), or optimizer.state_dtype = 'bfloat16'",
    )


def new_run(config: RunConfig, run: Path, nproc: int, *, rank: int = 0) -> NewRun:
    """Raises ConfigError when the settings are wrong or RUN is in use.

    `rank`: of a world that was joined. Its first one alone looks whether RUN is free: it makes RUN while others start.
    """
    if rank == 0 and (run / "config.toml").exists():
        raise ConfigError(f"{run} is a run already; go on with: megakern train --resume {run}, or name another --out")
    if rank == 0 and (run / "tokenizer.json").exists() and not (run / "ckpt").exists():  # not what a killed start left
        raise ConfigError(f"{run} holds a tokenizer.json of prepared data or of another model; name another --out")
    if config.train.init_from:
        base = find_base(config, PreparedData(config.data.path).tokenizer)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=base))
    return NewRun(check_run(config, nproc, rank=rank), run)


def resumed_run(config: RunConfig, run: Path, nproc: int, *, rank: int = 0) -> NewRun:
    """The run at `run` with `config`, which may differ from what it was started with. Raises ConfigError."""
    saved = next((manifest for _, manifest, _ in by_age(run / "ckpt") if manifest), None)
    require(
        saved is None or any(name.startswith("optimizer.") for name in saved.tensors),
        f"{run} holds weights alone, with no optimizer states to go on from, as megakern convert and ckpt merge-lora "
        f"make it; start a new run from its weights: megakern train CONFIG.toml --train.init_from {run} --out NEW",
    )
    new = NewRun(check_run(config, nproc, rank=rank), run)
    if saved and "config" in saved.state:
        _check_kept(new.config, from_table(RunConfig, saved.state["config"], f"the checkpoint of {run}"), run)
    wanted, found = Tokenizer.load(run / "tokenizer.json"), PreparedData(config.data.path).tokenizer
    require(wanted.sha256 == found.sha256, other_tokenizer(config.data.path, found, run, wanted))
    return new


# Of [model]: no tensor depends on them, and longer texts, as by rope_scaling, are a reason to change them.
_MAY_CHANGE = ("dropout", "init_std", "window", "rope_base", "rope_scaling", "sequence_length")


def _check_kept(config: RunConfig, saved: RunConfig, run: Path) -> None:
    """Raises ConfigError where a run would go on as another model, or with other states, than its checkpoint has: what
    does not load would leave a config.toml that nothing can open, and other heads of one width load in silence."""
    kept = [("model", field.name) for field in dataclasses.fields(config.model) if field.name not in _MAY_CHANGE]
    kept += [("model", "sequence_length")] if config.model.positions == "learned" else []
    kept += [("lora", field.name) for field in dataclasses.fields(config.lora) if field.name not in _MAY_CHANGE]
    kept += [("optimizer", "master"), ("optimizer", "state_dtype")]
    kept += [("train", "precision")] if config.parameter_precision != saved.parameter_precision else []
    for section, name in kept:
        old, new = (getattr(getattr(each, section), name) for each in (saved, config))
        require(
            old == new,
            f"{section}.{name} was {old!r} when {run} was saved, and a run keeps it, got {new!r}; leave it, or start "
            f"another run from these weights: megakern train CONFIG.toml --train.init_from {run} --out NEW",
        )


def fit_layout(config: RunConfig, nproc: int | None, overrides: list[str]) -> RunConfig:
    """A run's settings for `nproc` processes, where neither tp nor dp is among the overrides.

    A checkpoint loads into any layout, so --nproc alone is enough to go on with another number of processes: tp becomes
    the largest part of the old tp that divides it, dp the rest.
    """
    named = any(word.startswith(("--parallel.tp", "--parallel.dp")) for word in overrides)
    old = config.parallel
    if nproc is None or named or old.tp * (old.dp or 1) == nproc or nproc < 1:
        return config
    tp = math.gcd(old.tp, nproc)
    dp = nproc // tp
    print(f"layout for {nproc} processes: tp {tp} x dp {dp} (was tp {old.tp} x dp {old.dp})", flush=True)
    parallel = dataclasses.replace(old, tp=tp, dp=dp, replicas=math.gcd(old.replicas, dp))
    return dataclasses.replace(config, parallel=parallel)


def other_tokenizer(data: str | Path, found: Tokenizer, run: Path, wanted: Tokenizer) -> str:
    return (
        f"{data} was made with another tokenizer ({found.sha256[:12]}) than {run} ({wanted.sha256[:12]}): the same ids "
        f"mean other text; prepare the data again with: --tokenizer {run / 'tokenizer.json'}"
    )


def open_run(run: Path, overrides: list[str] | None = None) -> RunConfig:
    """The settings of a run, with overrides. Raises ConfigError when RUN is none."""
    if not (run / "config.toml").exists():
        raise ConfigError(f"{run} is not a run: it has no config.toml; make one with: megakern train CONFIG --out RUN")
    return load_config(run / "config.toml", overrides)
