"""Sequence parallelism: the same losses, gradients and dropout masks as one process, and the collectives it costs."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import megakern as mk
from megakern.layers.block import TransformerBlock
from megakern.layers.dropout import DropoutKey
from megakern.parallel import collectives
from tests.ranks import through_gloo

STEPS, B, T = 10, 4, 16  # ten steps: an error of a mask or a sum would have grown
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


def train(
    name: str, tp: int, micro_batches: int = 1, steps: int = STEPS, **recompute
) -> tuple[list[float], dict, dict]:
    """-> (losses, the first step's gradients in full, weights at the end in full)."""
    model = mk.GPT(CONFIGS[name], context_of(tp), seed=11, **recompute)
    optimizer = mk.AdamW(model.parameters(), lr=5e-3)
    losses, gradients = [], {}
    rows = B // micro_batches
    for step in range(steps):
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


def train_each_way(name: str) -> list:
    everything = ("attention", "mlp", "norm")
    ways = [
        {"recompute": "none"},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": everything},
        {"recompute": "full"},
    ]
    return [train(name, 2, steps=3, **way) for way in ways]  # what differs in a bit differs in the first


@pytest.mark.parametrize("name", CONFIGS)
def test_recompute_gives_the_same_bits(ranks, name):
    for kept, *others in ranks.run(train_each_way, 2, name):
        for other in others:
            assert kept[0] == other[0]
            for key in kept[1]:
                assert torch.equal(kept[1][key], other[1][key]), f"gradient of {key}"


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


# --- traffic ---


def traffic(values: dict, recompute: str) -> list[list[tuple[str, int]]]:
    """-> (collective, bytes of the whole tensor), in order: forward, backward, finish_gradients of a block in bf16."""
    config = mk.GPTConfig(width=32, heads=8, layers=1, **values)
    modules = frozenset() if recompute == "none" else frozenset(recompute.split())
    context = context_of(2)
    through_gloo(context.tp_group)
    block = TransformerBlock(config, 0, context, recompute=modules)
    seen: list[tuple[str, int]] = []

    def watched(name: str, function):
        def call(*tensors, **how):
            seen.append((name, max(t.numel() * t.element_size() for t in tensors)))
            return function(*tensors, **how)

        return call

    names = {"_all_gather_single": "gather", "_reduce_scatter_single": "scatter"}
    originals = {name: getattr(collectives, name) for name in names}
    all_reduce = dist.all_reduce
    for name, short in names.items():
        setattr(collectives, name, watched(short, originals[name]))
    dist.all_reduce = watched("reduce", all_reduce)
    phases, counted = [], []
    x = torch.randn(2, 6, 32, dtype=torch.bfloat16, requires_grad=True)
    try:
        y = None
        for phase in ("forward", "backward", "finish"):
            # CommDebugMode cannot follow a module that is called in backward.
            with CommDebugMode() if recompute == "none" else nullcontext() as everything:
                if phase == "forward":
                    y = block(x, dropout_key=DropoutKey(0, 0) if config.dropout else None)
                elif phase == "backward":
                    y.float().sum().backward()
                else:
                    mk.finish_gradients(block.parameters())
            phases.append(list(seen))
            counted.append(everything.get_total_counts() if everything else len(seen))
            seen.clear()
    finally:
        dist.all_reduce = all_reduce
        for name, function in originals.items():
            setattr(collectives, name, function)
    assert counted == [len(phase) for phase in phases], "a collective that goes another way"
    return phases


@pytest.mark.parametrize(
    "values",
    [
        {"dropout": 0.1},
        {"activation": "swiglu", "norm": "rmsnorm", "bias": False},
        {"parallel_residual": True},
        {"qk_norm": True},
    ],
    ids=",".join,
)
def test_traffic_of_a_block(ranks, values):
    """Forward two all-gathers and two reduce-scatters, backward as many and x gathered again for each half's weights
    (Megatron-LM does the same); once a step one all-reduce of the shared parameters' gradients."""
    stream = 2 * 12 * 32 * 2  # B T C of bf16
    gather, scatter = ("gather", stream), ("scatter", stream)
    norms = 1 if values.get("parallel_residual") else 2
    shared = 32 * (norms if values.get("norm") else 2 * norms + 2) + (8 if values.get("qk_norm") else 0)  # fp32
    for forward, backward, finish in ranks.run(traffic, 2, values, "none"):
        assert forward == [gather, scatter] * 2
        assert backward == [gather, gather, scatter] * 2  # dy, then x again, then dx; fc2 and fc1, proj and qkv
        assert finish == [("reduce", 4 * shared)]


def test_selective_recompute_of_the_core_and_norms_costs_no_traffic(ranks):
    for forward, backward, _ in ranks.run(traffic, 2, {"dropout": 0.1}, "attention norm"):
        assert (len(forward), len(backward)) == (4, 6)


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
