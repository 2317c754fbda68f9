"""The way in: what the source is, what is wrong with it, and the steps from there to a folder that was proven."""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megakern.config import ConfigError, GPTConfig, require
from megakern.convert import foreign
from megakern.convert.ours import Checkpoint, chunks, write_checkpoint
from megakern.convert.proof import Proof, ProofError, compare_logits, same_tensors, same_tokens, transformers_missing
from megakern.convert.tokenizer import Carried, from_hf, from_run, named_tokenizer
from megakern.data.files import DataError
from megakern.data.progress import Progress
from megakern.data.tokenizer import Tokenizer
from megakern.model.hf.families import Imported, family_of, from_config_json, same_function, to_config_json
from megakern.model.hf.names import Read, Rule, rules_of, tensor_problems
from megakern.model.hf.reading import Weights, read_json
from megakern.model.hf.writing import CODES, INDEX, Shard, header, index, shards_of
from megakern.train import checkpoint
from megakern.train.checkpoint_load import file_problems
from megakern.train.config import OptimizerConfig, RunConfig, TrainConfig, as_table, dump_config
from megakern.train.files import REAL, Files, temporary_suffix
from megakern.train.manifest import CheckpointError
from megakern.train.run import open_run

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Report:
    """What was made."""

    out: Path
    family: str
    parameters: int
    dtype: str
    bytes: int
    proof: Proof | None

    def __str__(self) -> str:
        rows = [
            ("family", self.family),
            ("parameters", f"{self.parameters / 1e6:,.2f} M" if self.parameters >= 1e6 else f"{self.parameters:,}"),
            ("dtype", f"{self.dtype}, {self.bytes / 1e6:,.1f} MB"),
            ("proof", "none, as asked for" if self.proof is None else str(self.proof)),
            ("made", str(self.out)),
        ]
        return "\n".join(f"  {name:<11} {value}" for name, value in rows)


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    ranks: int | None = None,
    tokenizer: str | None = None,
    step: int | None = None,
    shard_bytes: int | None = None,
    proof: bool = True,
    files: Files = REAL,
) -> Report:
    """Makes `out`: a run from a Hugging Face folder, a nanoGPT or an llm.c file, or a Hugging Face folder from a run.

    dtype: "fp32", "bf16" or "fp16"; None: as stored. To a run: ranks (the weights are cut for so many; any layout loads
    them), tokenizer ("bytes", a file or a folder, in place of the source's own). From a run: step (None: the newest
    sound checkpoint), shard_bytes (None: 5 GB). Memory: about the largest tensor, whatever the model's size.
    Raises ConfigError or CheckpointError with everything that is wrong; then nothing was written.
    """
    source, out = Path(source), Path(out)
    require(dtype is None or dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    require(ranks is None or 1 <= ranks <= 10**5, f"--ranks must be from 1 to 100000, got {ranks}")
    require(shard_bytes is None or shard_bytes >= 1, f"--shard-size must be above 0, got {shard_bytes}")
    require(
        not out.exists() and not out.is_symlink(), f"{out} exists already, and is not overwritten; name another --out"
    )
    require(source.is_file() or source.is_dir(), f"{source}: there is no such file or folder")
    exporting = (source / "config.toml").exists()
    for name, value, wrong in (
        ("ranks", ranks, exporting), ("tokenizer", tokenizer, exporting),
        ("step", step, not exporting), ("shard-size", shard_bytes, not exporting),
    ):  # fmt: skip
        require(value is None or not wrong, f"--{name} is for converting {'to' if exporting else 'from'} a run")
    if exporting:
        return _export(source, out, dtype, step, shard_bytes or 5 * 10**9, proof, files)
    return _import(source, out, dtype, ranks or 1, tokenizer, proof, files)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on `folder` itself, which the system drops when the process ends. Raises BlockingIOError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _new_folder(out: Path, need: int, files: Files) -> Iterator[Path]:
    """A folder beside `out` to write into. It becomes `out` at the end of the block, or is removed.

    Those that killed processes have left behind are removed first: their locks ended with the processes.
    """
    temporary = out.with_name(f"{out.name}.{temporary_suffix()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(out.name)}.tmp-{'[0-9a-f]' * 8}"):
            with suppress(BlockingIOError), _locked(left):  # held: another process writes there now
                shutil.rmtree(left, ignore_errors=True)
        free = files.free_bytes(out.parent)
        if free < need:
            raise CheckpointError(f"no space in {out.parent}: {need / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
        files.make_folder(temporary)
        try:
            with _locked(temporary):
                yield temporary
                files.sync_folder(temporary)
                files.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        files.sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error


def _bytes_of(rules: list[Rule], dtype: str) -> int:
    return sum(math.prod(shape) for rule in rules for shape in rule.theirs.values()) * CODES[dtype][1]


def _counted(read: Read, progress: Callable[[int], Any]) -> Read:
    def counted(name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        tensor = read(name, rows, columns)
        progress(tensor.numel() * tensor.element_size())
        return tensor

    return counted


# --- to a run ---


def _import(source: Path, out: Path, dtype, ranks: int, tokenizer, proof: bool, files: Files) -> Report:
    imported, weights, carried = _understand(source, dtype, tokenizer)
    try:
        config, rules = imported.config, rules_of(imported.config, imported.family)
        stored = DTYPES[dtype] if dtype else weights.dtypes[next(iter(rules[0].theirs))]
        size = _bytes_of(rules, stored)
        settings = _settings(config, stored)
        state = {
            **{"step": 0, "samples": 0, "updates": 0, "skipped_in_a_row": 0, "scaler": None},
            "config": {name: part for name, part in as_table(settings).items() if name != "data"},
            "tokenizer_sha256": carried.tokenizer.sha256,
            "imported": {"family": imported.family.name},
        }
        with _new_folder(out, size, files) as folder:
            files.make_folder(folder / "ckpt")
            with Progress(size, "writing") as bar:
                read = _counted(weights.read, bar.update)
                path = write_checkpoint(
                    folder / "ckpt", rules, read, dtype=stored, ranks=ranks, state=state, files=files
                )
            carried.write_run(folder, files)
            files.write_file(folder / "config.toml", dump_config(settings).encode())
            shown = None
            if proof:
                with closing(Checkpoint(path, checkpoint.read_manifest(path))) as ours:
                    shown = _prove(imported, rules, ours, weights.read, stored, exporting=False)
        return _report(out, imported.family.name, rules, stored, shown)
    finally:
        weights.close()


def _understand(source: Path, dtype: str | None, tokenizer: str | None) -> tuple[Imported, Any, Carried]:
    """Everything of the source, checked. Raises ConfigError with all that is wrong."""
    problems: list[str] = []
    imported, weights, carried = None, None, None
    if source.is_dir():
        table = read_json(source, "config.json", problems)
        if table is None and not problems:
            raise ConfigError(
                f"{source} is neither a run (it has no config.toml) nor a Hugging Face folder (it has no config.json)"
            )
        if not problems:
            imported, problems = from_config_json(table)
        weights = Weights(source, problems, prefix=imported.family.prefix if imported else "")
        if imported is not None:
            family, vocabulary = imported.family.name, imported.config.vocab_size
            carried = from_hf(source, family, vocabulary, tokenizer, problems)
    else:
        imported, weights = foreign.read_llmc(source) if foreign.is_llmc(source) else foreign.read_nanogpt(source)
        try:
            if tokenizer is None:
                problems.append("a file of weights has no tokenizer; name one with --tokenizer FILE (or bytes)")
            else:
                carried = Carried(named_tokenizer(tokenizer))
                if carried.tokenizer.vocab_size > imported.config.vocab_size:
                    problems.append(
                        f"{tokenizer} has {carried.tokenizer.vocab_size} ids, the model's vocabulary is "
                        f"{imported.config.vocab_size}"
                    )
        except DataError as error:
            problems.append(str(error))
    if imported is not None:
        rules, tied = rules_of(imported.config, imported.family), imported.config.tied_embeddings
        # A file that could not be opened is one problem, not one for each of its tensors.
        if weights.shapes and not any(problem.split(":")[0].endswith(".safetensors") for problem in problems):
            found = tensor_problems(rules, weights.shapes, weights.dtypes, tied=tied, one_dtype=dtype is None)
            problems += found or _untied(rules, weights, tied)
    if problems:
        weights.close()
        raise ConfigError(f"{source} cannot be converted, nothing was written:\n  " + "\n  ".join(problems))
    return imported, weights, carried


def _untied(rules: list[Rule], weights: Any, tied: bool) -> list[str]:
    """A head in the file of a model whose head is its embedding has to be that."""
    if not tied or "lm_head.weight" not in weights.shapes:
        return []
    ((name, shape),) = rules[0].theirs.items()
    for start, stop in chunks(shape):
        if not torch.equal(weights.read(name, slice(start, stop)), weights.read("lm_head.weight", slice(start, stop))):
            return [f"lm_head.weight: differs from {name}, but the config says tie_word_embeddings"]
    return []


def _settings(model, dtype: str) -> RunConfig:
    """Settings under which the weights are used in the dtype they are stored in."""
    precision = {long: short for short, long in DTYPES.items()}[dtype]
    master = {"fp32": "none", "bf16": "split", "fp16": "fp32"}[precision]
    return RunConfig(
        model=model, optimizer=OptimizerConfig(master=master), train=TrainConfig(precision=precision, steps=1)
    )


# --- from a run ---


def _export(run: Path, out: Path, dtype, step, shard_bytes: int, proof: bool, files: Files) -> Report:
    settings = open_run(run)
    require(
        settings.lora.rank == 0,
        f"{run} has adapters, which no folder of Hugging Face's models holds; make a whole model of it first: "
        f"megakern ckpt merge-lora {run} --out NEW",
    )
    config, carried = settings.model, from_run(run)
    path = checkpoint.newest(run / "ckpt") if step is None else run / "ckpt" / checkpoint.folder_name(step)
    manifest = checkpoint.read_manifest(path)
    if step is not None and (problems := file_problems(path, manifest, sorted(manifest.files))):
        raise CheckpointError(f"{path} is damaged, nothing was written:\n  " + "\n  ".join(problems))
    checkpoint.require_tokenizer(manifest.state, carried.tokenizer.sha256, path)
    origin = manifest.state.get("imported")
    family = family_of(config, origin.get("family") if isinstance(origin, dict) else None)
    rules, ours = rules_of(config, family), Checkpoint(path, manifest)
    try:
        if ours.shapes != {rule.ours: rule.shape for rule in rules}:
            raise CheckpointError(f"{path} does not hold the tensors of the model in {run / 'config.toml'}")
        stored = DTYPES[dtype] if dtype else ours.dtypes[rules[0].ours]
        size = _bytes_of(rules, stored)
        shapes = {name: (rule, shape) for rule in rules for name, shape in rule.theirs.items()}
        shards = shards_of({name: shape for name, (_, shape) in shapes.items()}, stored, shard_bytes)
        table = to_config_json(config, family, stored, carried.token_ids())
        with _new_folder(out, size, files) as folder:
            with Progress(size, "writing") as bar:
                for shard in shards:
                    files.write_stream(folder / shard.file, _shard_bytes(shard, shapes, ours, stored, bar.update))
            if len(shards) > 1:
                files.write_file(folder / INDEX, index(shards, stored))
            carried.write_hf(folder, config.sequence_length, files)
            files.write_file(folder / "config.json", (json.dumps(table, indent=2) + "\n").encode())
            shown = None
            if proof:
                shown = _prove_folder(folder, config, carried.tokenizer, rules, ours, stored)
        return _report(out, family.name, rules, stored, shown)
    finally:
        ours.close()


def _shard_bytes(shard: Shard, shapes, ours: Checkpoint, dtype: str, progress: Callable[[int], Any]):
    """The bytes of one safetensors file, a few rows at a time."""
    yield header(shard, dtype)
    for name in shard.tensors:
        rule, shape = shapes[name]
        for start, stop in chunks(shape):
            rows = rule.their_rows(name, ours.read, start, stop).to(getattr(torch, dtype)).contiguous()
            if not torch.isfinite(torch.stack(torch.aminmax(rows))).all():
                raise CheckpointError(f"{name} holds NaN or infinity as {dtype}; nothing was written")
            progress(rows.numel() * rows.element_size())
            yield memoryview(rows.reshape(-1).view(torch.uint8).numpy())


def _prove_folder(
    folder: Path, config: GPTConfig, tokenizer: Tokenizer, rules: list[Rule], ours: Checkpoint, dtype: str
) -> Proof:
    """Reads what was written as any folder of a stranger."""
    problems: list[str] = []
    imported, found = from_config_json(read_json(folder, "config.json", problems))
    weights = Weights(folder, problems)
    try:
        problems += found + tensor_problems(rules, weights.shapes, weights.dtypes, tied=False, one_dtype=True)
        if imported is None or problems or not same_function(imported.config, config):
            raise ProofError("what was written does not describe this model:\n  " + "\n  ".join(problems))
        proof = _prove(imported, rules, ours, weights.read, dtype, exporting=True)
        if proof.difference is not None:
            same_tokens(folder, tokenizer)
        return proof
    finally:
        weights.close()


# --- both ---


def _prove(
    imported: Imported, rules: list[Rule], ours: Checkpoint, theirs: Read, dtype: str, *, exporting: bool
) -> Proof:
    narrow = getattr(torch, dtype)
    with Progress(_bytes_of(rules, dtype), "reading again") as bar:
        count = same_tensors(rules, ours, theirs, narrow, exporting=exporting, progress=bar.update)
    if reason := transformers_missing(imported.family, imported.config):
        return Proof(count, why_not=reason)
    return Proof(count, *compare_logits(imported.config, imported.family, imported.used, ours, theirs, narrow))


def _report(out: Path, family: str, rules: list[Rule], dtype: str, proof: Proof | None) -> Report:
    parameters = sum(math.prod(shape) for rule in rules for shape in rule.theirs.values())
    return Report(out, family, parameters, dtype, parameters * CODES[dtype][1], proof)
