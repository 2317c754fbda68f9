"""Hooks on any module of a model run, also where several modules are computed as one. No device needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import megakern as mk
from megakern.model.cache import KVCache, PagePool, Sequence

CONFIGS = {name: mk.presets[name] for name in ("tiny-gpt2", "tiny-llama")}
CONFIGS["norms of q and k"] = dataclasses.replace(CONFIGS["tiny-llama"], qk_norm=True)
CONFIGS["parallel"] = dataclasses.replace(CONFIGS["tiny-gpt2"], parallel_residual=True)


def watch(model: mk.GPT) -> list[str]:
    """Hook every module -> the names of those whose hooks have run, in that order."""
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def callable_names(model: mk.GPT) -> list[str]:
    """A head is an embedding used backwards: its weight alone is read. Lists of modules are not called."""
    return sorted(name for name, _ in model.named_modules() if name not in ("blocks", "head"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_module_s_hooks_run_once_in_training(config):
    model, hooked = (mk.GPT(config, seed=1) for _ in range(2))
    tokens = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(2))
    ran, losses = watch(hooked), [each(tokens[:, :-1], tokens[:, 1:]) for each in (model, hooked)]
    assert sorted(ran) == callable_names(hooked)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(hooked.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_every_module_s_hooks_run_once_a_step_of_generation(config):
    model = mk.GPT(config, seed=1)
    tokens = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(2))
    pool = PagePool(model.config, tokens=64)
    sequences, whole, ran = [Sequence(pool) for _ in range(2)], model(tokens), watch(model)
    for t, expected in enumerate(whole.unbind(1)):
        ran.clear()
        logits = model(tokens[:, t : t + 1], cache=KVCache(pool, sequences, [1, 1]))
        assert sorted(ran) == callable_names(model)
        torch.testing.assert_close(logits[:, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset, place", [("tiny-gpt2", "mlp.fc1"), ("tiny-llama", "mlp.up"), ("tiny-llama", "norm2")])
def test_what_a_hook_returns_counts(preset, place):
    """A half of a block that reads zeros adds what its last layer makes of zeros: nothing, without its weight."""
    config = mk.presets[preset]
    model, without = (mk.GPT(config, seed=1) for _ in range(2))
    tokens = torch.randint(0, 250, (2, 10), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        without.blocks[0].mlp.fc2.weight.zero_()
    assert not torch.equal(model(tokens), without(tokens))
    layer = model.get_submodule(f"blocks.0.{place}")
    handle = layer.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    torch.testing.assert_close(model(tokens), without(tokens), rtol=1e-5, atol=1e-6)
    handle.remove()
    assert not torch.equal(model(tokens), without(tokens))


def test_backward_hooks_run_and_tools_that_watch_all_modules_change_nothing():
    model, ran = mk.GPT(mk.presets["tiny-gpt2"], seed=1), []
    fc1 = model.blocks[0].mlp.fc1
    handle = fc1.register_full_backward_hook(lambda _module, _inputs, outputs: ran.append(outputs[0].shape))
    tokens = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(2))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert ran == [(2, 10, model.config.size_of_ffn)]
    handle.remove()
    called = set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        model(tokens)
    finally:
        handle.remove()
    assert model.blocks[0].mlp.fc2 in called and fc1 not in called
