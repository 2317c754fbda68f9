"""nanoGPT's and llm.c's files: the model that was in them, and nothing else that a file may hold. No device needed."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megakern.config import ConfigError
from megakern.convert.run import convert
from megakern.data.tokenizer import Tokenizer
from megakern.inference import load_run
from megakern.train.run import open_run
from tests.hf_models import transformers

V, T, C, L, H = 259, 32, 24, 2, 3
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
ARGUMENTS = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, "bias": True, "dropout": 0.1}


def gpt2(activation: str):
    """GPT-2 of transformers with random weights, the vocabulary just above that of the byte tokenizer."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, activation_function=activation,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("ln_" in name and name.endswith("weight")), std=0.2)
    return model


def matrices(model) -> dict[str, torch.Tensor]:
    """Its tensors under GPT-2's names, as nn.Linear has them: (out, in)."""
    state = model.transformer.state_dict()
    return {name: value.t() if name.endswith(TURNED) else value for name, value in state.items()}


def same_logits(run, model) -> None:
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
        expected = getattr(expected, "logits", expected)
        ours = load_run(run).model(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def refused(path, *messages: str, **how) -> None:
    with pytest.raises(ConfigError) as error:
        convert(path, path.parent / "run", **{"tokenizer": "bytes", **how})
    for message in messages:
        assert re.search(message, str(error.value)), f"{message!r} is not in: {error.value}"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# --- llm.c ---


def write_llmc(path, model, version: int = 3, *, header: dict | None = None, more: bytes = b"") -> None:
    """As llm.c's train_gpt2.py writes it: a header of 256 int32, then each tensor of all layers."""
    tensors, padded = matrices(model), 320
    head = np.zeros(256, dtype="<i4")
    head[:8] = 20240326, version, T, V, L, H, C, padded
    for at, value in (header or {}).items():
        head[at] = value
    wte = torch.cat([tensors["wte.weight"], torch.full((padded - V, C), 7.0)])  # what is there must not matter
    order = [wte, tensors["wpe.weight"]]
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        order += [torch.stack([tensors[f"h.{i}.{name}.{kind}"] for i in range(L)]) for kind in ("weight", "bias")]
    order += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    dtype = {3: torch.float32, 5: torch.bfloat16}.get(version, torch.float32)
    body = b"".join(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for tensor in order)
    path.write_bytes(head.tobytes() + body + more)


@pytest.mark.parametrize("version, dtype", [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc(tmp_path, version, dtype, without_fsync):
    model = gpt2("gelu_new")
    write_llmc(tmp_path / "model.bin", model, version)
    report = convert(tmp_path / "model.bin", tmp_path / "run", tokenizer="bytes")
    assert report.proof.difference is not None and report.dtype == str(dtype).removeprefix("torch.")
    settings = open_run(tmp_path / "run")
    assert (settings.model.vocab_size, settings.model.padded_vocab_size) == (V, 384)
    if version == 3:
        same_logits(tmp_path / "run", model)
    stored = load_run(tmp_path / "run").model.blocks[1].mlp.fc2.weight
    assert torch.equal(stored, matrices(model)["h.1.mlp.c_proj.weight"].to(dtype))
    convert(tmp_path / "run", tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.to(dtype)), name


@pytest.mark.parametrize(
    "header, message",
    [
        ({1: 4}, r"version must be 3 \(fp32\) or 5 \(bf16\), got 4"),
        ({2: 0}, "sequence length must be from 1 to 16777216, got 0"),
        ({3: -1}, "vocabulary must be from 1"),
        ({4: 100_000}, "layers must be from 1 to 4096, got 100000"),
        ({5: 5}, "24 channels are not divisible by 5 heads"),
        ({6: 2**30}, "channels must be from 1"),
        ({7: 100}, "the padded vocabulary 100 is less than the vocabulary 259"),
        ({9: 1}, "number 9 of the header is not 0"),
        ({2: T + 1}, r"a model of this shape has \d+ bytes, the file has \d+"),
    ],
)
def test_headers_of_llmc_that_lie(tmp_path, header, message):
    write_llmc(tmp_path / "model.bin", gpt2("gelu_new"), header=header)
    refused(tmp_path / "model.bin", message)


def test_files_of_llmc_of_another_size(tmp_path):
    path = tmp_path / "model.bin"
    write_llmc(path, gpt2("gelu_new"), more=b"\0")
    refused(path, "a model of this shape has .* bytes, the file has")
    path.write_bytes(path.read_bytes()[:-5])
    refused(path, "a model of this shape has .* bytes, the file has")
    path.write_bytes(path.read_bytes()[:500])
    refused(path, "not a model of llm.c: it must begin with 256 numbers")


# --- nanoGPT ---


def save_nanogpt(path, tensors: dict, prefix: str = "", **changes) -> None:
    """As nanoGPT's train.py saves it."""
    state = {f"{prefix}transformer.{name}": value.contiguous() for name, value in tensors.items()}
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    saved = {"model": state, "model_args": ARGUMENTS, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}
    saved |= {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}, "config": {"lr": 1e-3}}
    torch.save(saved | changes, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(tmp_path, prefix, without_fsync):
    model = gpt2("gelu")
    save_nanogpt(tmp_path / "ckpt.pt", matrices(model), prefix)
    report = convert(tmp_path / "ckpt.pt", tmp_path / "run", tokenizer="bytes")
    assert report.proof.difference is not None
    assert open_run(tmp_path / "run").model.dropout == 0.1
    same_logits(tmp_path / "run", model)


class Unbiased(torch.nn.Module):
    """nanoGPT's model with bias=False, in plain PyTorch."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, tokens):
        w = self.tensors
        x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
        for i in range(L):
            h = f"h.{i}."
            qkv = F.layer_norm(x, (C,), w[h + "ln_1.weight"], None) @ w[h + "attn.c_attn.weight"].t()
            q, k, v = (part.unflatten(2, (H, -1)).transpose(1, 2) for part in qkv.split(C, dim=2))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + o @ w[h + "attn.c_proj.weight"].t()
            inner = F.layer_norm(x, (C,), w[h + "ln_2.weight"], None) @ w[h + "mlp.c_fc.weight"].t()
            x = x + F.gelu(inner) @ w[h + "mlp.c_proj.weight"].t()
        return F.layer_norm(x, (C,), w["ln_f.weight"], None) @ w["wte.weight"].t()


def test_nanogpt_without_biases(tmp_path, without_fsync):
    tensors = {name: value for name, value in matrices(gpt2("gelu")).items() if not name.endswith("bias")}
    save_nanogpt(tmp_path / "ckpt.pt", tensors, model_args=ARGUMENTS | {"bias": False})
    report = convert(tmp_path / "ckpt.pt", tmp_path / "run", tokenizer="bytes")
    assert "logits not compared: GPT-2 of transformers always has biases" in str(report)
    same_logits(tmp_path / "run", Unbiased(tensors))
    with pytest.raises(ConfigError, match=r"nearest is gpt2, .*\n  model.bias = False \(a gpt2 has True\)"):
        convert(tmp_path / "run", tmp_path / "hf")


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["model", "optimizer", "config", "more"])
def test_a_pickle_that_runs_code_runs_nothing(tmp_path, place):
    made = tmp_path / "made"
    folder = tmp_path / "in"
    folder.mkdir()
    save_nanogpt(folder / "ckpt.pt", matrices(gpt2("gelu")), **{place: {"x": Evil(made)}})
    refused(folder / "ckpt.pt", "not readable as tensors and numbers alone .* can run code, and is never opened")
    assert not made.exists()
    torch.load(folder / "ckpt.pt", weights_only=False)
    assert made.exists(), "it would have run"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": [1]}, "not a checkpoint of nanoGPT: it must be a table with model and model_args"),
        ({"model_args": ARGUMENTS | {"rope": 1}}, "model_args: unknown key 'rope'"),
        ({"model_args": ARGUMENTS | {"n_head": "3"}}, "n_head must be there and a number .*, got '3'"),
        ({"model_args": ARGUMENTS | {"n_layer": 10**6}}, "n_layer must be from 1 to"),
        ({"model_args": ARGUMENTS | {"n_head": 5}}, "width = 24 is not divisible by model.heads = 5"),
        ({"model_args": ARGUMENTS | {"n_layer": 3}}, "transformer.h.2.ln_1.weight: missing"),
        ({"model_args": ARGUMENTS | {"bias": False}}, "transformer.ln_f.bias: not a tensor of this model"),
        ({"model": {"x": 1}}, "model: 'x' must be the name of a tensor"),
    ],
)
def test_checkpoints_of_nanogpt_that_are_wrong(tmp_path, changes, message):
    save_nanogpt(tmp_path / "ckpt.pt", matrices(gpt2("gelu")), **changes)
    refused(tmp_path / "ckpt.pt", message)


def test_files_that_are_nothing_of_these(tmp_path):
    path = tmp_path / "ckpt.pt"
    for content in (b"", b"hello", bytes(2000)):
        path.write_bytes(content)
        refused(path, "neither a zip file, as torch.save writes nanoGPT's checkpoints, nor one of llm.c")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "not readable as tensors and numbers alone")
    torch.save({"model": Evil(tmp_path / "made")}, path, _use_new_zipfile_serialization=False)
    refused(path, "neither a zip file")


def test_a_file_of_weights_needs_a_tokenizer(tmp_path):
    path = tmp_path / "model.bin"
    write_llmc(path, gpt2("gelu_new"))
    refused(path, "a file of weights has no tokenizer; name one with --tokenizer FILE", tokenizer=None)
    refused(path, "nothing.json: cannot read the tokenizer", tokenizer="nothing.json")
    assert Tokenizer.load("bytes").vocab_size <= V
    write_llmc(path, gpt2("gelu_new"), header={3: 100, 7: 320})
    refused(path, "bytes has 257 ids, the model's vocabulary is 100")
