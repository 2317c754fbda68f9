"""Patched Hugging Face models on a GPU, where Triton and CUDA kernels take the place of PyTorch's. Only with a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import megakern as mk
from tests.hugging import FAMILIES, T, batch, gradients, make
from tests.test_patch import assert_same_training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Head dims of real models.
WIDE = {"hidden_size": 384, "intermediate_size": 512}
SIZES = {name: {"n_embd": 384} if name == "gpt2" else {**WIDE, "head_dim": 64} for name in FAMILIES}


def on_gpu(kind: str) -> dict:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch(kind).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, dtype):
    plain = make(family, **SIZES[family]).to("cuda", dtype)
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    for kind in ("plain", "left", "right", "packed"):
        assert_same_training(patched, plain, on_gpu(kind))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_greedy_generation(family):
    plain = make(family, **SIZES[family]).cuda().eval()
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    inputs = on_gpu("left")
    prompts = {name: inputs[name][:, T - 10 :] for name in ("input_ids", "attention_mask")}
    for rows in (slice(None), slice(1, None)):
        some = {name: x[rows] for name, x in prompts.items()}
        expected, ours = (m.generate(**some, max_new_tokens=6, do_sample=False) for m in (plain, patched))
        assert torch.equal(expected, ours)


@pytest.mark.slow
def test_compiled():
    """By inductor, which sees into Triton's kernels."""
    model = make("llama", **SIZES["llama"]).cuda()
    mk.patch(model)
    compiled = torch.compile(model, fullgraph=True)
    for kind in ("plain", "left"):
        inputs = {**on_gpu(kind), "use_cache": False}
        expected = model(**inputs).loss
        expected.backward()
        wanted = gradients(model)
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-3, atol=1e-4)
