"""What is wrong with a folder is one error that lists everything, and nothing is written. No device needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megakern.cli import main
from megakern.config import ConfigError
from megakern.convert import proof, run
from megakern.convert.run import convert
from megakern.model.hf.names import Rule
from megakern.train.files import Files
from megakern.train.manifest import CheckpointError
from tests import hf_models
from tests.hf_models import edit

ROOT = Path(__file__).resolve().parent.parent
INDEX = "model.safetensors.index.json"
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama in one file and in three, and a GPT-2."""
    folder = tmp_path_factory.mktemp("sound")
    hf_models.save("llama2", folder / "one")
    hf_models.save("llama2", folder / "shards", max_shard_size=100_000)
    assert len(list((folder / "shards").glob("*.safetensors"))) == 3
    hf_models.save("gpt2", folder / "gpt2")
    return folder


@pytest.fixture
def one(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "hf")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved / "shards", tmp_path / "hf")


def refused(folder, *messages: str, **how) -> str:
    """The error of converting `folder`, which must hold each of `messages`, and leave nothing."""
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises((ConfigError, CheckpointError)) as error:
        convert(folder, folder.parent / "out", **how)
    for message in messages:
        assert re.search(message, str(error.value)), f"{message!r} is not in: {error.value}"
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    return str(error.value)


def change(folder, file: str = "model.safetensors", **tensors) -> None:
    """Replaces tensors of a file; None takes one away."""
    held = load_file(folder / file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / file, {"format": "pt"})


# --- tensors ---


def test_everything_wrong_is_in_one_error(one):
    change(one, **{NORM: None, UP: torch.zeros(80, 47), "model.surprise": torch.ones(2),
                   "model.norm.weight": torch.zeros(48, dtype=torch.int32)})  # fmt: skip
    (one / "tokenizer.json").write_text("{")
    text = refused(
        one,
        r"cannot be converted, nothing was written:\n",
        rf"{NORM}: missing, it must have shape \[48\]",
        r"model.surprise: not a tensor of this model \(shape \[2\]\)",
        rf"{UP}: shape must be \[80, 48\], got \[80, 47\]",
        "model.norm.weight: dtype must be float32, bfloat16 or float16, got I32",
        "tokenizer.json: not JSON",
    )
    assert text.count("\n") == 5


def test_config_and_tensors_together(one):
    edit(one, auto_map={"AutoModel": "x.Y"}, foo=1)
    (one / "model.safetensors").write_bytes(b"no")
    refused(one, "auto_map names code", "unknown key 'foo'", "model.safetensors: damaged or cut short")


def test_several_dtypes_need_a_choice(one, without_fsync):
    change(one, **{NORM: torch.ones(48, dtype=torch.bfloat16)})
    refused(one, f"several dtypes: 1 are bfloat16, as {NORM}; 20 are float32, as .*; choose one for all with --dtype")
    assert convert(one, one.parent / "run", dtype="fp32").dtype == "float32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(one, value):
    change(one, **{NORM: torch.full((48,), value), "lm_head.weight": torch.full((301, 48), value)})
    refused(one, "these weights hold NaN or infinity: blocks.1.norm1.weight, head.weight")


def test_weights_that_do_not_fit_a_narrow_dtype(one):
    change(one, **{NORM: torch.full((48,), 1e6)})
    refused(one, "these weights hold NaN or infinity: blocks.1.norm1.weight", dtype="fp16")


def test_a_tied_head_must_be_the_embedding(saved, tmp_path, without_fsync):
    folder = shutil.copytree(saved / "gpt2", tmp_path / "hf")
    table = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    change(folder, **{"lm_head.weight": table.clone()})
    assert convert(folder, tmp_path / "run").proof.tensors == 28
    table[300, 47] += 1
    change(folder, **{"lm_head.weight": table})
    refused(folder, "lm_head.weight: differs from transformer.wte.weight, but the config says tie_word_embeddings")


def test_buffers_and_names_without_a_prefix_are_known(saved, tmp_path, without_fsync):
    """As in the file of GPT-2 on the Hub: no `transformer.`, and a mask for each layer."""
    folder = shutil.copytree(saved / "gpt2", tmp_path / "hf")
    held = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(plain, folder / "model.safetensors")
    convert(folder, tmp_path / "run")
    plain["h.0.attn.scale"] = torch.ones(1)
    save_file(plain, folder / "model.safetensors")
    refused(folder, "transformer.h.0.attn.scale: not a tensor of this model")


# --- files ---


def header_of(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, table: dict, data: bytes) -> None:
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file(one, kept):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "missing" not in refused(one, "model.safetensors: damaged or cut short")


def test_a_truncated_shard(shards):
    path = shards / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(shards, "model-00002-of-00003.safetensors: damaged or cut short")


@pytest.mark.parametrize(
    "lie",
    [
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [192, 0]},
        {"data_offsets": [-8, 184]},
        {"shape": [2**62, 48]},
        {"shape": [49]},
        {"dtype": "F64"},
        {"dtype": "PICKLE"},
    ],
)
def test_a_header_that_lies(one, lie):
    table, data = header_of(one / "model.safetensors")
    table[NORM] |= lie
    with_header(one / "model.safetensors", table, data)
    refused(one, "model.safetensors: damaged or cut short")


def test_tensors_that_overlap(one):
    table, data = header_of(one / "model.safetensors")
    table[NORM]["data_offsets"] = table["model.norm.weight"]["data_offsets"]
    with_header(one / "model.safetensors", table, data)
    refused(one, "model.safetensors: damaged or cut short")


def weight_map(folder, **changes) -> None:
    table = json.loads((folder / INDEX).read_text())
    where = table["weight_map"] | changes
    edit(folder, INDEX, weight_map={name: file for name, file in where.items() if file is not None})


def test_an_index_that_disagrees(shards):
    where = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(where.values())) if file != where[UP])
    weight_map(shards, **{UP: other, NORM: None, "model.ghost": other})
    (shards / "model-4.safetensors").write_bytes((shards / other).read_bytes())
    refused(
        shards,
        rf"{UP}: {INDEX} says it is in {other}, but it is in {where[UP]}",
        rf"{NORM}: in {where[NORM]}, but not in {INDEX}",
        rf"model.ghost: {INDEX} says it is in {other}, but it is not there",
        rf"model-4.safetensors: not in {INDEX}",
    )


def test_a_tensor_in_two_shards(shards):
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    doubled = next(iter(load_file(shards / names[0])))
    change(shards, names[1], **{doubled: torch.ones(2)})
    refused(shards, rf"{doubled}: both in {names[0]} and in {names[1]}")


@pytest.mark.parametrize(
    "name", ["../hf/model.safetensors", "/etc/passwd", "a/b.safetensors", "..safetensors", "C:\\x", "x\0y", ""]
)
def test_names_of_shards_stay_in_the_folder(shards, name):
    weight_map(shards, **{UP: name})
    refused(shards, re.escape(repr(name)) + " cannot be the name of a shard; it must be a plain file name")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=40) | st.lists(st.sampled_from(["..", "/", "a", ".", "\\", ".safetensors"])).map("".join))
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    from megakern.model.hf.reading import _SHARD

    if _SHARD.fullmatch(name) and ".." not in name:
        assert (tmp_path / name).parent == tmp_path and os.path.basename(name) == name


def test_a_missing_shard(shards):
    (shards / "model-00003-of-00003.safetensors").unlink()
    assert "not a tensor" not in refused(shards, f"model-00003-of-00003.safetensors: missing, {INDEX} names it")


def test_an_index_that_is_none(shards):
    edit(shards, INDEX, weight_map=[1])
    refused(shards, f"{INDEX}: weight_map must be an object")


def test_links(saved, one):
    for name in ("model.safetensors", "tokenizer.json"):
        (one / name).unlink()
        (one / name).symlink_to(saved / "one" / name)
    edit(one, "tokenizer_config.json")
    out = "a link that leads out of the folder; it is not followed"
    refused(one, f"model.safetensors: {out}", f"tokenizer.json: {out}")
    (one / "model.safetensors").unlink()
    os.mkfifo(one / "model.safetensors")
    refused(one, "model.safetensors: not a plain file")


def test_links_of_the_cache_of_the_hub_are_followed(saved, tmp_path, without_fsync):
    """models--x--y/snapshots/REVISION/NAME -> ../../blobs/HASH, and nowhere else."""
    folder = tmp_path / "models--x--y" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    blobs = shutil.copytree(saved / "one", tmp_path / "models--x--y" / "blobs")
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    convert(folder, tmp_path / "run")
    (folder / "config.json").unlink()
    shutil.copy(blobs / "config.json", tmp_path / "models--x--y" / "config.json")
    (folder / "config.json").symlink_to("../../config.json")
    with pytest.raises(ConfigError, match=r"config\.json: a link that leads out"):
        convert(folder, tmp_path / "other")


def test_pickles_are_never_opened(one):
    (one / "model.safetensors").rename(one / "pytorch_model.bin")
    refused(one, "model.safetensors: missing. There is pytorch_model.bin, a pickle, which can run code and is not read")


def test_other_files_of_weights_are_not_looked_at(one, without_fsync):
    convert(one, one.parent / "alone")
    (one / "consolidated.safetensors").write_bytes(b"whatever")
    (one / "pytorch_model.bin").write_bytes(b"whatever")
    convert(one, one.parent / "run")
    files = [sorted((one.parent / name / "ckpt").glob("*/*.safetensors")) for name in ("alone", "run")]
    alone, beside = ([file.read_bytes() for file in each] for each in files)
    assert alone and alone == beside


def test_a_single_file_of_several_needs_an_index(shards):
    (shards / INDEX).unlink()
    refused(shards, f"{INDEX}: missing, which files must have")


# --- the command ---


def test_what_is_no_source(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither a run .* nor a Hugging Face folder")
    assert main(["convert", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def test_options_that_do_not_fit(one):
    refused(one, "--dtype must be one of fp32, bf16, fp16, got 'int8'", dtype="int8")
    refused(one, "--ranks must be from 1", ranks=0)
    refused(one, "--step is for converting from a run", step=3)
    refused(one, "--shard-size is for converting from a run", shard_bytes=10)
    refused(one, "--shard-size must be above 0", shard_bytes=0)
    (one.parent / "out").mkdir()
    refused(one, "out exists already, and is not overwritten; name another --out")


def test_options_of_a_run(one, without_fsync):
    run = one.parent / "run"
    convert(one, run)
    refused(run, "--ranks is for converting to a run", ranks=2)
    refused(run, "--tokenizer is for converting to a run", tokenizer="bytes")
    refused(run, "step-00000007", step=7)


# --- faults while writing, and a wrong result ---


class Counting(Files):
    """Every operation counts; number `fail_at` raises."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.count, self.fail_at = 0, fail_at

    def _tick(self) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(28, "No space left on device")

    def make_folder(self, path):
        self._tick()
        super().make_folder(path)

    def write(self, descriptor, data):
        self._tick()
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self._tick()

    def sync_folder(self, path):
        self._tick()

    def rename(self, old, new):
        self._tick()
        super().rename(old, new)


@pytest.mark.parametrize("exporting", [False, True])
def test_a_failed_write_leaves_nothing(one, exporting, without_fsync):
    """Each operation of the disk fails once."""
    source = one
    if exporting:
        convert(one, one.parent / "run")
        source = one.parent / "run"
    files = Counting()
    convert(source, one.parent / "whole", proof=False, files=files)
    shutil.rmtree(one.parent / "whole")
    assert files.count > 15
    tidying = 0
    for number in range(1, files.count):  # the last one is the fsync after the rename
        before = sorted(path.name for path in one.parent.iterdir())
        try:
            convert(source, one.parent / "out", proof=False, files=Counting(number))
        except CheckpointError as error:
            assert "No space left" in str(error)
            assert sorted(path.name for path in one.parent.iterdir()) == before, f"operation {number}"
        else:
            tidying += 1  # after the checkpoint is whole: its `latest` alone
            shutil.rmtree(one.parent / "out")
    assert tidying <= (0 if exporting else 4)


def test_no_space_is_seen_before(one):
    class Full(Files):
        def free_bytes(self, path):
            return 1000

    refused(one, r"no space in .*: 0.\d MB needed, 0.0 MB free", files=Full())


def swapped(self: Rule, read, start: int, stop: int):
    """The wrong way round: k before q."""
    if self.kind != "qkv":
        return right(self, read, start, stop)
    return right(self, read, start, stop).flip(0)


right = Rule.our_rows


def test_a_wrong_result_is_not_kept(one, monkeypatch):
    monkeypatch.setattr(Rule, "our_rows", swapped)
    refused(one, "what was written is not what was read:\n.*self_attn.q_proj.weight, rows 0 to 47")


def test_a_wrong_meaning_is_found_by_the_logits(one, monkeypatch):
    """Wrong both ways, so that the tensors come back as they were: only the other implementation can tell."""
    monkeypatch.setattr("megakern.convert.run.same_tensors", lambda *_, **__: 0)
    monkeypatch.setattr(Rule, "our_rows", swapped)
    refused(one, r"logits differ from those of transformers by .*The first difference comes out of: block 0 \(by ")


def test_a_config_that_is_read_wrongly_is_found(one, monkeypatch):
    """An epsilon of 1e-2 for 1e-5."""
    original = proof._our_logits

    def wrong(config, *rest):
        object.__setattr__(config, "norm_eps", 1e-2)
        return original(config, *rest)

    monkeypatch.setattr(proof, "_our_logits", wrong)
    refused(one, "first difference comes out of: block 0")


def test_damage_between_writing_and_reading_is_found(one, monkeypatch, without_fsync):
    """A bit of the exported file flips."""
    convert(one, one.parent / "run")
    original = Files.write_stream

    def write(self, path, chunks):
        original(self, path, chunks)
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(Files, "write_stream", write)
    refused(one.parent / "run", r"what was written is not what was read:\n  head.weight, rows 0 to 383")


def test_without_transformers_the_tensors_are_still_compared(one, monkeypatch, without_fsync):
    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None)
    report = convert(one, one.parent / "run")
    assert report.proof.difference is None and report.proof.tensors == 21
    assert "logits not compared: transformers is not installed" in str(report)
    monkeypatch.setattr(Rule, "our_rows", swapped)
    refused(one, "what was written is not what was read")


def test_no_proof_is_only_by_name(one, without_fsync, capsys):
    assert main(["convert", str(one), "--out", str(one.parent / "run"), "--no-proof"]) == 0
    assert re.search(r"proof +none, as asked for", capsys.readouterr().out)


KILLED = """
import os, signal, sys
from pathlib import Path
from megakern.convert.run import convert
from megakern.train.files import Files

class Dying(Files):
    def rename(self, *paths):
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), proof=False, files=Dying())
"""


def test_what_a_killed_conversion_left_goes_with_the_next(one, without_fsync):
    out = one.parent / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, str(one), str(out)], cwd=ROOT)
    (left,) = one.parent.glob("out.tmp-*")
    assert died.returncode == -9 and not out.exists()
    living, other = one.parent / "out.tmp-0123abcd", one.parent / "out.tmp-notours"
    living.mkdir(), other.mkdir()
    with run._locked(living):  # as another process does that writes there now
        convert(one, out, proof=False)
    assert out.exists() and living.exists() and other.exists() and not left.exists()
