"""Runs that were trained here, to Hugging Face and back as users do it; what memory a conversion takes. No GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from megakern.cli import main
from megakern.config import ConfigError
from megakern.convert.run import convert
from megakern.inference import load_run
from megakern.model.generate import complete
from megakern.model.presets import presets
from megakern.train.checkpoint import newest
from megakern.train.config import LoraConfig
from megakern.train.run import open_run
from tests import hf_models, runs
from tests.checkpoints import UnsyncedFiles
from tests.commands import Command, finish
from tests.hf_models import transformers


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-gpt2"])
def test_a_trained_run_there_and_back(preset, tiny_data, tmp_path, without_fsync, capsys):
    model = dataclasses.replace(presets[preset], vocab_size=260, vocab_multiple=64)
    run, hf, again = tmp_path / "run", tmp_path / "hf", tmp_path / "again"
    runs.train(run, runs.config_of(tiny_data, model, steps=8, save_every=4))
    assert main(["convert", str(run), "--out", str(hf)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"proof +\d+ tensors read again, the same bits; logits as transformers' to \d\.\de-0[5-9]", shown)
    assert f"family      {'llama' if 'llama' in preset else 'gpt2'}\n" in shown
    assert main(["convert", str(hf), "--out", str(again)]) == 0

    text = "def f1(x):\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    theirs.generation_config.eos_token_id = None
    prompt = tokenizer(text, return_tensors="pt")
    continued = theirs.generate(**prompt, do_sample=False, max_new_tokens=50)[0, prompt["input_ids"].shape[1] :]
    for folder in (run, again):
        loaded = load_run(folder)
        (ours,) = complete(loaded.model, [loaded.tokenizer.encode(text)], max_new_tokens=50)
        assert ours.tokens == continued.tolist(), folder.name
    convert(run, tmp_path / "earlier", step=4)
    capsys.readouterr()
    assert main(["train", "--resume", str(again), "--data.path", str(tiny_data)]) == 2
    assert re.search(r"holds weights alone, .*; start a new run .*--train.init_from", capsys.readouterr().err)


@pytest.mark.parametrize("lora", [0, 2])
def test_import_train_on_export(lora, tiny_data, tmp_path, without_fsync):
    """Someone else's model, trained here, is a model that transformers loads again."""
    hf_models.save("llama3", tmp_path / "hf", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "base", tokenizer="bytes")
    base = newest(tmp_path / "base" / "ckpt")
    config = runs.config_of(tiny_data, open_run(tmp_path / "base").model, steps=3, save_every=3, init_from=str(base))
    config = dataclasses.replace(config, lora=LoraConfig(rank=lora))
    run = tmp_path / "run"
    runs.train(run, config)
    if lora:
        with pytest.raises(ConfigError, match=r"has adapters, .*megakern ckpt merge-lora"):
            convert(run, tmp_path / "out")
        assert main(["ckpt", "merge-lora", str(run), "--out", str(tmp_path / "merged")]) == 0
        run = tmp_path / "merged"
    convert(run, tmp_path / "out")
    tokens = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(1))
    first, trained = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("hf", "out")
    )
    with torch.no_grad():
        before, after = first(tokens).logits, trained(tokens).logits
        torch.testing.assert_close(load_run(run).model(tokens), after, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.01, "training must have changed it"


def test_a_shape_of_no_family(tiny_data, tmp_path, without_fsync, capsys):
    model = dataclasses.replace(presets["demo"], width=32, heads=2, vocab_size=257, sequence_length=16)
    runs.train(tmp_path / "run", runs.config_of(tiny_data, model, steps=1))
    assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 2
    assert "nearest is qwen3, from which it differs in:\n  model.activation = 'relu_squared'" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_is_not_exported(tiny_data, tmp_path, without_fsync, capsys):
    run = tmp_path / "run"
    runs.train(run, runs.config_of(tiny_data, dataclasses.replace(presets["tiny-gpt2"], vocab_size=257), steps=1))
    shard = next((run / "ckpt" / "step-00000001").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for step in ([], ["--step", "1"]):
        assert main(["convert", str(run), "--out", str(tmp_path / "hf"), *step]) == 1
        assert "its SHA-256 is not the one in the manifest" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


# --- memory ---


class Peak:
    """`with Peak() as peak:` measures by how many bytes this process's own memory grows, mapped files not counted."""

    def __enter__(self) -> Peak:
        self.start, self.grown, self._done = self._now(), 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._done:
            self.grown = max(self.grown, self._now() - self.start)
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def convert_large(folder: str) -> int:
    """Both ways, in a fresh process; says what each took, and what it takes to hold the whole model."""
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: what is freed goes back to the system at once
        assert ctypes.CDLL(None).mallopt(option, 65536) == 1
    root = Path(folder)
    keys = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4,
            "max_position_embeddings": 64, "vocab_size": 4096}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys))
    model.save_pretrained(root / "large", max_shard_size="20MB")
    del model
    small = {**keys, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(root / "small")
    convert(root / "small", root / "small-run", tokenizer="bytes")  # what is imported at the first use
    convert(root / "small-run", root / "small-hf")
    gc.collect()
    files = UnsyncedFiles()
    for source, out, how in (("large", "run", {"tokenizer": "bytes"}), ("run", "back", {"shard_bytes": 10**7})):
        with Peak() as peak:
            report = convert(root / source, root / out, files=files, **how)
        assert report.proof.difference is not None
        print(f"{out} took {peak.grown}", flush=True)
    with Peak() as peak:
        model = load_run(root / "run").model
    print(f"all took {peak.grown}, {sum(p.numel() for p in model.parameters()) * 4} bytes", flush=True)
    return 0


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """A model of 13 times its largest tensor. Anonymous memory alone: what is mapped from files can be dropped."""
    output = finish(Command(convert_large, str(tmp_path)))
    took = {name: int(size) for name, size in re.findall(r"(run|back|all) took (\d+)", output)}
    largest, whole = 4 * 4096 * 256, int(re.search(r"(\d+) bytes", output)[1])
    assert whole > 13 * largest
    assert took["all"] > 0.9 * whole, "what is measured must see a model that is held"
    for name in ("run", "back"):
        assert took[name] < 3 * largest + 8 * 2**20, (
            f"{name}: {took[name] / 1e6:.1f} MB, the largest {largest / 1e6:.1f}"
        )
