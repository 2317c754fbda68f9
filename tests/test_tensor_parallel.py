"""Training on one, two and four tensor-parallel ranks gives the same losses; the start is the same bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.layers.dropout import DropoutKey
from tests.closeness import assert_close_to_ref
from tests.runs import FAMILIES

STEPS, B, T = 12, 4, 16


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch(step: int) -> torch.Tensor:
    """(B, T + 1): counting texts with noise, which a model can learn in part."""
    g = torch.Generator().manual_seed(step)
    text = torch.randint(0, 60, (B, 1), generator=g) + torch.arange(T + 1) * torch.randint(1, 4, (B, 1), generator=g)
    noise = torch.rand(B, T + 1, generator=g) < 0.1
    return torch.where(noise, torch.randint(0, 60, (B, T + 1), generator=g), text % 60)


def train(name: str, tp: int, recompute: str = "none") -> tuple[dict, list[float], dict]:
    """-> (weights at the start, losses, weights at the end), weights in full."""
    context = mk.ParallelContext.create(tp=tp) if tp > 1 else None
    model = mk.GPT(FAMILIES[name], context, seed=11, recompute=recompute)
    start = {key: full(parameter) for key, parameter in model.named_parameters()}
    optimizer = mk.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        text = batch(step)
        loss = model(text[:, :-1], text[:, 1:], dropout_key=DropoutKey(seed=11, step=step))
        loss.backward()
        mk.finish_gradients(model.parameters())
        mk.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return start, losses, {key: full(parameter) for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_train_alike(ranks, name):
    start, losses, end = train(name, 1)
    assert losses[-1] < 0.95 * losses[0], "the model must learn for this test to see anything"
    for tp in (2, 4):
        for rank, (rank_start, rank_losses, rank_end) in enumerate(ranks.run(train, tp, name, tp)):
            for key, value in start.items():
                assert torch.equal(rank_start[key], value), f"tp={tp} rank {rank}: initial {key}"
            for step, (loss, expected) in enumerate(zip(rank_losses, losses, strict=True)):
                assert loss == pytest.approx(expected, rel=1e-5), f"tp={tp} rank {rank}: loss of step {step}"
            for key, value in end.items():
                torch.testing.assert_close(rank_end[key], value, rtol=1e-2, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_recompute_gives_the_same_bits_on_two_ranks(ranks):
    kept, again = (ranks.run(train, 2, "llama", 2, recompute)[0] for recompute in ("none", "full"))
    assert kept[1] == again[1]
    assert all(torch.equal(kept[2][key], again[2][key]) for key in kept[2])


def one_step(vocab_size: int, tp: int, compute_dtype: torch.dtype) -> tuple[float, torch.Tensor, torch.Tensor]:
    """-> loss, logits, gradient of the embedding in full."""
    context = mk.ParallelContext.create(tp=tp) if tp > 1 else None
    config = dataclasses.replace(FAMILIES["gpt2"], vocab_size=vocab_size, dropout=0.0)
    model = mk.GPT(config, context, seed=11, compute_dtype=compute_dtype)
    text = batch(0) % vocab_size
    loss = model(text[:, :-1], text[:, 1:])
    loss.backward()
    return loss.item(), model(text[:, :-1]).detach().float(), full(model.embedding.weight.grad)


@pytest.mark.parametrize("vocab_size", [5, 32, 33])
def test_ranks_that_own_nothing_but_padding(ranks, vocab_size):
    """Of 5 tokens padded to 32, and of 33 padded to 64, four ranks leave some with no token at all."""
    expected = one_step(vocab_size, 1, torch.float32)
    assert expected[1].shape == (B, T, vocab_size)
    for result in ranks.run(one_step, 4, vocab_size, 4, torch.float32):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_two_ranks_in_bf16(ranks):
    expected, narrow = one_step(60, 1, torch.float32), one_step(60, 1, torch.bfloat16)
    for result in ranks.run(one_step, 2, 60, 2, torch.bfloat16):
        for ours, wide, alone in zip(result[1:], expected[1:], narrow[1:], strict=True):
            assert_close_to_ref(ours.bfloat16(), wide.double(), alone.bfloat16())
        assert result[0] == pytest.approx(expected[0], rel=2e-3)


def replicas(name: str) -> dict:
    """This rank's own copies of the replicated parameters, after training."""
    context = mk.ParallelContext.create(tp=2)
    model = mk.GPT(FAMILIES[name], context, seed=11)
    optimizer = mk.AdamW(model.parameters(), lr=3e-3)
    for step in range(3):
        text = batch(step)
        model(text[:, :-1], text[:, 1:], dropout_key=DropoutKey(seed=11, step=step)).backward()
        mk.finish_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    copies = {k: p.to_local().detach() for k, p in model.named_parameters() if p.placements[0].is_replicate()}
    assert copies and all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return copies


@pytest.mark.parametrize("name", FAMILIES)
def test_replicated_parameters_stay_bit_identical(ranks, name):
    first, second = ranks.run(replicas, 2, name)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def start_under_fsdp() -> tuple[bool, list]:
    """tp = 2 x dp = 2, sharded on the meta device and filled afterwards."""
    context = mk.ParallelContext.create(tp=2)
    config = dataclasses.replace(FAMILIES["llama"], dropout=0.0)
    model = mk.GPT(config, context, device="meta")
    for block in model.blocks:
        fully_shard(block, mesh=context.mesh["dp"])
    fully_shard(model, mesh=context.mesh["dp"])
    model.materialize("cpu", seed=11)
    expected = dict(mk.GPT(config, seed=11).named_parameters())
    same = [key for key, parameter in model.named_parameters() if torch.equal(full(parameter), expected[key].detach())]
    text = batch(0)
    own = text[context.rank("dp") * 2 :][:2]
    model(own[:, :-1], own[:, 1:]).backward()
    return len(same) == len(expected), [full(model.embedding.weight.grad), full(model.blocks[0].norm1.weight.grad)]


def test_fsdp_shards_and_fills_the_same_model(ranks):
    config = dataclasses.replace(FAMILIES["llama"], dropout=0.0)
    model, text = mk.GPT(config, seed=11), batch(0)
    model(text[:, :-1], text[:, 1:]).backward()
    for same, gradients in ranks.run(start_under_fsdp, 4):
        assert same
        expected = [model.embedding.weight.grad, model.blocks[0].norm1.weight.grad]
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
