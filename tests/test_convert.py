"""Conversions of every family and shape: the same logits as transformers, the same bits back. No device needed.

Two gloo ranks run once for all models.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megakern.convert.run import convert
from megakern.inference import load_run
from megakern.model.generate import complete
from megakern.model.gpt import GPT
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.manifest import read_manifest
from megakern.train.run import open_run
from tests import hf_models
from tests.hf_models import MODELS, T, transformers


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder with, for each model: NAME as saved by transformers, NAME.run imported, NAME.hf exported again."""
    folder = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megakern.train.files.Files.sync", lambda self, descriptor: None)
        patch.setattr("megakern.train.files.Files.sync_folder", lambda self, path: None)
        models = {name: hf_models.save(name, folder / name) for name in MODELS}
        for number, name in enumerate(MODELS):
            report = convert(folder / name, folder / f"{name}.run", ranks=1 + number % 3)
            assert report.proof.difference is not None, report.proof.why_not
            convert(folder / f"{name}.run", folder / f"{name}.hf", shard_bytes=10**5)
    return folder, models


def tokens_of(model, rows: int = 2) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(converted, name):
    folder, models = converted
    tokens = tokens_of(models[name])
    expected = models[name](tokens).logits
    assert expected.std() > 0.3, "logits near zero would show nothing"
    ours = load_run(folder / f"{name}.run").model(tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def two_ranks(runs: list, prompts: list) -> list:
    """The logits of each run's model on this rank of tp = 2."""
    parallel = ParallelContext.create(tp=2)
    found = []
    for run, tokens in zip(runs, prompts, strict=True):
        model = GPT(open_run(run).model, parallel).eval()
        tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        checkpoint.load(checkpoint.newest(run / "ckpt", parallel), tensors, parallel, only="model.")
        with torch.no_grad():
            found.append(model(torch.tensor(tokens)).numpy())
    return found


def test_logits_under_two_ranks(converted, ranks):
    folder, models = converted
    prompts = [tokens_of(model, 1) for model in models.values()]
    runs = [folder / f"{name}.run" for name in MODELS]
    for found in ranks.run(two_ranks, 2, runs, [tokens.tolist() for tokens in prompts]):
        for model, tokens, ours in zip(models.values(), prompts, found, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(ours), model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_import_has_the_original_tensors(converted, name):
    folder, models = converted
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{name}.hf")
    assert type(again) is type(models[name])
    wanted, found = models[name].state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    for key in wanted:
        assert torch.equal(wanted[key], found[key]), key
    assert len(list((folder / f"{name}.hf").glob("*.safetensors"))) > 1, "it must be written in several shards"


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_export_has_the_same_bits(converted, name, tmp_path, without_fsync):
    folder, _ = converted
    convert(folder / f"{name}.hf", tmp_path / "again")
    first, second = (saved_tensors(run) for run in (folder / f"{name}.run", tmp_path / "again"))
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]), key
    models = [open_run(run).model for run in (folder / f"{name}.run", tmp_path / "again")]
    sizes = {"kv_heads": models[0].key_value_heads, "head_dim": models[0].size_of_head,
             "ffn_size": models[0].size_of_ffn}  # fmt: skip
    assert dataclasses.replace(models[0], **sizes) == dataclasses.replace(models[1], **sizes)


def saved_tensors(run) -> dict[str, torch.Tensor]:
    path = checkpoint.newest(run / "ckpt")
    entries = read_manifest(path).tensors
    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    checkpoint.load(path, tensors, ParallelContext())
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_both_write_the_same_text(converted, name):
    folder, models = converted
    prompt = tokens_of(models[name], 1)[:, :8]
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{name}.hf").eval()
    exported.generation_config.eos_token_id = None  # 50 tokens, whatever they are
    theirs = exported.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=50)
    ours = [
        each.tokens for each in complete(load_run(folder / f"{name}.run").model, prompt.tolist(), max_new_tokens=50)
    ]
    assert ours == theirs[:, 8:].tolist()
    assert len(set(ours[0])) > 3, "a text of one token would show little"


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_stored_dtypes_are_kept(tmp_path, dtype, precision, without_fsync):
    model = hf_models.save("qwen3", tmp_path / "hf", dtype)
    convert(tmp_path / "hf", tmp_path / "run")
    settings = open_run(tmp_path / "run")
    assert settings.parameter_precision == settings.train.precision == precision
    assert {tensor.dtype for tensor in saved_tensors(tmp_path / "run").values()} == {dtype}
    assert load_run(tmp_path / "run").model.compute_dtype == dtype
    report = convert(tmp_path / "run", tmp_path / "back")
    assert report.dtype == str(dtype).removeprefix("torch.")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    wide = convert(tmp_path / "run", tmp_path / "wide", dtype="fp32")
    assert (wide.dtype, wide.bytes) == ("float32", 2 * report.bytes)


def test_dtype_and_ranks_on_import(tmp_path, without_fsync):
    model = hf_models.save("llama3", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", dtype="bf16", ranks=3)
    tensors = saved_tensors(tmp_path / "run")
    wanted = model.state_dict()["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16)
    assert torch.equal(tensors["model.blocks.1.mlp.up.weight"], wanted)
    manifest = read_manifest(checkpoint.newest(tmp_path / "run" / "ckpt"))
    assert {name.split("-part")[0] for name in manifest.files} == {f"rank-{rank:05d}" for rank in range(3)}
    assert manifest.layout["dp"] == 3


def test_the_padding_is_zero_and_goes_again(converted):
    folder, models = converted
    tensors = saved_tensors(folder / "llama2.run")
    assert tensors["model.embedding.weight"].shape == tensors["model.head.weight"].shape == (384, 48)
    for name in ("embedding", "head"):
        assert tensors[f"model.{name}.weight"][301:].count_nonzero() == 0
    index = json.loads((folder / "llama2.hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in models["llama2"].parameters())
