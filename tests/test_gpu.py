"""A model, its trainer and its checkpoints on a GPU, against the same on the CPU. Runs only where there is a GPU."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import megakern as mk
from megakern.layers.dropout import DropoutKey
from megakern.model.presets import presets
from megakern.train import machine
from tests.closeness import FLOOR, assert_close_to_ref
from tests.runs import config_of, losses, open_trainer, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KEY = DropoutKey(seed=3, step=5, first_sample=0)


def gradients(model, device, compute_dtype=None):
    """Loss and gradients of one batch, from the same weights on every device."""
    config = dataclasses.replace(presets[model], dropout=0.1)
    built = mk.GPT(config, device=device, compute_dtype=compute_dtype)
    ids = torch.randint(0, config.vocab_size, (3, 41), generator=torch.Generator().manual_seed(0)).to(device)
    loss = built(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), dropout_key=KEY)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in built.named_parameters()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_loss_and_gradients_are_those_of_the_cpu(model, dtype, backend):
    """Same initial weights, same dropout masks. fp32 products stay fp32, not tf32 (torch's default)."""
    exact_loss, exact = gradients(model, "cpu")
    _, same = gradients(model, "cpu", dtype)  # its own error is the measure of ours
    with mk.use_backend(backend):
        loss, ours = gradients(model, "cuda", dtype)
    torch.testing.assert_close(loss.cpu(), exact_loss, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=0)
    for name, gradient in ours.items():  # gradients of fp32 parameters; what they are made of has `dtype`
        assert_close_to_ref(gradient.cpu(), exact[name].double(), same[name], name=name, floor=FLOOR[dtype])


def test_a_run_follows_the_run_on_the_cpu_and_either_goes_on_with_the_other(tiny_data, tmp_path, monkeypatch):
    config = config_of(tiny_data, steps=8, save_every=4)
    train(tmp_path / "gpu", config)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine.device_type() == "cpu"
        train(tmp_path / "cpu", config)
    ours, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert ours == pytest.approx(theirs, rel=1e-4)
    for run, other in (("gpu", "cpu"), ("cpu", "gpu")):
        longer = config_of(tiny_data, steps=10, save_every=4)
        with monkeypatch.context() as patch:
            if other == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            train(tmp_path / run, longer)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    assert max(losses(tmp_path / "gpu")) == 9  # from 0


def test_a_step_waits_for_the_gpu_once(tiny_data, tmp_path):
    """PyTorch's own count of calls that wait for a GPU."""
    trainer = open_trainer(tmp_path / "run", config_of(tiny_data, steps=8, precision="bf16"))
    for _ in range(3):  # kernels are compiled and chosen
        trainer.train_step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == 1, waits


def test_bf16_training_lowers_the_loss(tiny_data, tmp_path):
    config = config_of(tiny_data, steps=30, save_every=30, precision="bf16")
    train(tmp_path / "run", config)
    values = list(losses(tmp_path / "run").values())
    assert values[-1] < values[0] - 0.3


def test_generation_is_that_of_the_cpu():
    from megakern.model.generate import complete
    from megakern.model.sampling import Sampling

    prompts = [torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 40, 1)]
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=1)):
        out = {}
        for device in ("cpu", "cuda"):
            model = mk.GPT(presets["tiny-llama"], device=device).eval()
            out[device] = [each.tokens for each in complete(model, prompts, max_new_tokens=20, sampling=sampling)]
        assert out["cpu"] == out["cuda"]
