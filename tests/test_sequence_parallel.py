"""Sequence parallelism: the same losses, gradients and dropout masks as one process, and the collectives it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.layers.dropout import DropoutKey

STEPS, B, T = 10, 4, 16
SMALL = {"width": 32, "heads": 8, "layers": 2, "vocab_size": 60, "vocab_multiple": 32, "sequence_length": T}
CONFIGS = {
    "gpt2": mk.GPTConfig(**SMALL, dropout=0.1),
    "llama": mk.GPTConfig(
        **SMALL, dropout=0.1, kv_heads=4, ffn_size=48, norm="rmsnorm", activation="swiglu", positions="rope",
        bias=False, qkv_bias=True, tied_embeddings=False, qk_norm=True, window=5,
    ),
}  # fmt: skip


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch(step: int, rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    text = torch.randint(0, 60, (B, 1), generator=g) + torch.arange(T + 1) * torch.randint(1, 4, (B, 1), generator=g)
    text = (text % 60)[:rows]
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def context_of(tp: int, sequence_parallel: bool = True) -> mk.ParallelContext | None:
    return mk.ParallelContext.create(tp=tp, sequence_parallel=sequence_parallel) if tp > 1 else None


def train(name: str, tp: int, micro_batches: int = 1, recompute: str = "none") -> tuple[list[float], dict, dict]:
    """-> (losses, the first step's gradients in full, weights at the end in full)."""
    model = mk.GPT(CONFIGS[name], context_of(tp), seed=11, recompute=recompute)
    optimizer = mk.AdamW(model.parameters(), lr=5e-3)
    losses, gradients = [], {}
    rows = B // micro_batches
    for step in range(STEPS):
        tokens, targets = batch(step)
        total = 0.0
        for first in range(0, B, rows):
            own = slice(first, first + rows)
            key = DropoutKey(seed=11, step=step, first_sample=first)
            loss = model(tokens[own], targets[own], dropout_key=key) / micro_batches
            loss.backward()
            total += loss.item()
        mk.finish_gradients(model.parameters())
        gradients = gradients or {key: full(parameter.grad) for key, parameter in model.named_parameters()}
        mk.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, gradients, {key: full(parameter) for key, parameter in model.named_parameters()}


def assert_like_one_process(results: list, expected: tuple, label: str) -> None:
    for rank, (losses, gradients, weights) in enumerate(results):
        for step, (loss, wanted) in enumerate(zip(losses, expected[0], strict=True)):
            assert loss == pytest.approx(wanted, rel=1e-5), f"{label} rank {rank}: loss of step {step}"
        for key, value in expected[1].items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                gradients[key], value, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, k=key: f"{label} {k}: {m}"
            )
        for key, value in weights.items():
            assert torch.equal(value, results[0][2][key]), f"{label}: {key} differs between ranks"


@pytest.mark.parametrize("name", CONFIGS)
def test_training_agrees_with_one_process(ranks, name):
    expected = train(name, 1)
    assert expected[0][-1] < 0.95 * expected[0][0], "the model must learn for this test to see anything"
    for tp in (2, 4):
        assert_like_one_process(ranks.run(train, tp, name, tp), expected, f"tp={tp}")


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulated_gradients_agree_with_one_process(ranks, name):
    assert_like_one_process(ranks.run(train, 2, name, 2, 2), train(name, 1), "two micro-batches")


def forward_modes() -> list:
    """-> loss and logits while gradients are recorded and under no_grad, logits of an odd T under no_grad."""
    model = mk.GPT(CONFIGS["llama"], context_of(2), seed=11).eval()
    tokens, targets = batch(0)
    with torch.no_grad():
        plain = [model(tokens, targets), model(tokens), model(tokens[:, :7]), model(tokens[:, :7], last_only=True)]
    return [model(tokens, targets).detach(), model(tokens).detach(), *plain]


def test_evaluation_works_for_any_length(ranks):
    model = mk.GPT(CONFIGS["llama"], seed=11).eval()
    tokens, targets = batch(0)
    with torch.no_grad():
        loss, logits = model(tokens, targets), model(tokens)
        odd = model(tokens[:, :7])
    for result in ranks.run(forward_modes, 2):
        torch.testing.assert_close(result, [loss, logits, loss, logits, odd, odd[:, -1:]], rtol=1e-5, atol=1e-5)


def gradients_under_fsdp() -> dict:
    """tp = 2 with sequence parallelism x dp = 2, two micro-batches: the gradients in full, summed over dp."""
    context = context_of(2)
    config = dataclasses.replace(CONFIGS["llama"], dropout=0.0)
    model = mk.GPT(config, context, device="meta")
    for block in model.blocks:
        fully_shard(block, mesh=context.mesh["dp"])
    fully_shard(model, mesh=context.mesh["dp"])
    model.materialize("cpu", seed=11)
    tokens, targets = batch(0)
    for index in range(2):
        row = context.rank("dp") * 2 + index
        model.set_requires_gradient_sync(index == 1)
        (model(tokens[row : row + 1], targets[row : row + 1]) / 2).backward()
    mk.finish_gradients(model.parameters())
    mk.clip_grad_norm_(model.parameters(), float("inf"))  # refuses partial gradients
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def test_composes_with_fully_shard(ranks):
    model = mk.GPT(dataclasses.replace(CONFIGS["llama"], dropout=0.0), seed=11)
    model(*batch(0)).backward()
    for gradients in ranks.run(gradients_under_fsdp, 4):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


# --- what must not go wrong in silence ---


def refusals() -> None:
    model = mk.GPT(CONFIGS["llama"], context_of(2), seed=11).eval()
    tokens, targets = batch(0)
    with pytest.raises(ValueError, match=r"T = 7 tokens cannot be split over tp = 2 ranks; pad or cut the text to a"):
        model(tokens[:, :7])
    with pytest.raises(ValueError, match=r"last_only is for generation; with sequence_parallel, call it under"):
        model(tokens, last_only=True)
    model(tokens, targets).backward()
    with pytest.raises(ValueError, match=r"is not made yet; call finish_gradients\(model\.parameters\(\)\) after"):
        mk.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"partial ones: finish_gradients\(model\.parameters\(\)\)"):
        mk.AdamW(model.parameters()).step()
    partial = {name for name, p in model.named_parameters() if p.grad.placements[0].is_partial()}
    assert partial == {name for name, _ in model.named_parameters() if "norm" in name}
    mk.finish_gradients(model.parameters())
    before = {name: full(p.grad) for name, p in model.named_parameters()}
    mk.finish_gradients(model.parameters())  # a second call finds nothing partial
    assert all(torch.equal(full(p.grad), before[name]) for name, p in model.named_parameters())
    mk.clip_grad_norm_(model.parameters(), 1.0)


def test_forgotten_sums_and_odd_lengths_are_refused(ranks):
    ranks.run(refusals, 2)


def test_one_process_ignores_it():
    context = mk.ParallelContext.create(sequence_parallel=True)
    assert not context.tensor_region.shards_sequence
    model = mk.GPT(CONFIGS["gpt2"], context, seed=11).eval()
    assert model(batch(0)[0][:, :7]).shape == (B, 7, 60)
