"""The formulas of activation memory: against what a block really keeps alive, and against arXiv 2205.05198's."""

from __future__ import annotations

import dataclasses
import gc
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megakern as mk
from megakern.config import ConfigError
from megakern.layers.block import TransformerBlock
from megakern.layers.dropout import DropoutKey
from megakern.layers.recompute import run_again
from megakern.model.memory import activation_bytes

B, T = 2, 32
GPT2 = mk.GPTConfig(width=64, heads=4, layers=2, vocab_size=60, vocab_multiple=32, sequence_length=T, dropout=0.1)
CONFIGS = {
    "gpt2": GPT2,
    "parallel residual": dataclasses.replace(GPT2, parallel_residual=True),
    "llama": dataclasses.replace(
        GPT2, kv_heads=2, ffn_size=176, norm="rmsnorm", activation="swiglu", positions="rope", bias=False
    ),
    "qk_norm": dataclasses.replace(GPT2, heads=8, kv_heads=2, positions="rope", qk_norm=True),
}  # fmt: skip
CHOICES = [
    ("none", ("attention",)),
    ("selective", ("attention",)),
    ("selective", ("mlp",)),
    ("selective", ("norm",)),
    ("selective", ("attention", "mlp", "norm")),
    ("full", ("attention",)),
]


class Births(TorchDispatchMode):
    """Remembers every storage that an op has made, without keeping it alive."""

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in inputs]
        self.old = {tensor.untyped_storage()._cdata for tensor in locals_}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.old:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        if dist.is_initialized():
            time.sleep(0.1)  # gloo's threads drop their last references a moment after a collective is done
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def context_of(tp: int, sequence_parallel: bool) -> mk.ParallelContext | None:
    return mk.ParallelContext.create(tp=tp, sequence_parallel=sequence_parallel) if tp > 1 else None


def kept_by_a_block(name: str, tp: int, sequence_parallel: bool) -> list[int]:
    """-> bytes that live from forward to backward in bf16, for each of CHOICES: the input, and new storages alive after
    forward but for the result, which is the next block's."""
    config, counts = CONFIGS[name], []
    rope = torch.randn(T, config.size_of_head // 2), torch.randn(T, config.size_of_head // 2)
    for recompute, modules in CHOICES:
        model = mk.GPT(config, context_of(tp, sequence_parallel), recompute=recompute, recompute_modules=modules)
        block = model.blocks[0]
        x = torch.randn(B, T // tp if sequence_parallel else T, config.width, dtype=torch.bfloat16, requires_grad=True)
        how = {"rope": rope if config.positions == "rope" else None, "dropout_key": DropoutKey(1, 1)}
        births = Births([x, *rope, *block.parameters()])
        with births:
            y = run_again(block, x, **how) if recompute == "full" else block(x, **how)
        own = y.untyped_storage().nbytes()
        counts.append(births.alive() - own + x.untyped_storage().nbytes())
        y.float().sum().backward()  # what is kept must be enough
        assert x.grad is not None
    return counts


def saved_by_a_block(name: str) -> int:
    """-> bytes of distinct storages that autograd saves in bf16, parameters left out, on one rank."""
    config, storages = CONFIGS[name], {}
    block = TransformerBlock(config)
    x = torch.randn(B, T, config.width, dtype=torch.bfloat16, requires_grad=True)
    rope = torch.randn(T, config.size_of_head // 2), torch.randn(T, config.size_of_head // 2)
    others = {t.untyped_storage()._cdata for t in (*block.parameters(), *rope)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x, rope=rope if config.positions == "rope" else None, dropout_key=DropoutKey(1, 1))
    assert y.requires_grad
    return sum(size for key, size in storages.items() if key not in others)


def expected(name: str, tp: int, sequence_parallel: bool) -> list[int]:
    layout = {"tp": tp, "sequence_parallel": sequence_parallel}
    return [
        activation_bytes(CONFIGS[name], B, recompute=recompute, recompute_modules=modules, **layout).per_layer
        for recompute, modules in CHOICES
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("tp", "sequence_parallel"),
    [(1, False), pytest.param(2, False, marks=pytest.mark.slow), (2, True)],
    ids=["1", "2", "2 and sp"],
)
def test_a_block_keeps_what_the_formula_says(ranks, name, tp, sequence_parallel):
    layout = (name, tp, sequence_parallel)
    results = [kept_by_a_block(*layout)] if tp == 1 else ranks.run(kept_by_a_block, tp, *layout)
    for counts in results:
        for count, wanted, choice in zip(counts, expected(*layout), CHOICES, strict=True):
            assert count == pytest.approx(wanted, rel=0.01), f"{choice}: {count} bytes, formula {wanted}"


@pytest.mark.parametrize("name", CONFIGS)
def test_autograd_saves_what_the_formula_says(name):
    assert saved_by_a_block(name) == pytest.approx(expected(name, 1, False)[0], rel=0.01)


@pytest.mark.parametrize("t", [1, 2, 8])
def test_formulas_are_the_papers_with_its_masks_and_scores(t):
    """Their dropout masks and unfused scores added, our statistics taken away: equations 1 to 6, exactly."""
    config = mk.presets["megatron-8.3b"]
    s, b, h, a = config.sequence_length, 4, config.width, config.heads
    sbh = s * b * h

    def theirs(sequence_parallel: bool, recompute: str, scores: bool) -> float:
        how = {"recompute": recompute, "recompute_modules": ("attention",)}  # theirs is of the core alone
        bytes_ = activation_bytes(config, b, tp=t, sequence_parallel=sequence_parallel, **how)
        kept = sum(size for term, size in bytes_.layer.items() if term not in ("norm statistics", "log-sum-exp"))
        masks = 0 if recompute == "full" else 2 * sbh / (t if sequence_parallel else 1)
        return kept + masks + (5 * a * s * s * b / t if scores else 0)

    assert theirs(False, "none", True) == pytest.approx(sbh * (10 + 24 / t + 5 * a * s / (h * t)), rel=1e-12)
    assert theirs(True, "none", True) == pytest.approx(sbh / t * (34 + 5 * a * s / h), rel=1e-12)
    assert theirs(False, "selective", False) == pytest.approx(sbh * (10 + 24 / t), rel=1e-12)
    assert theirs(True, "selective", False) == pytest.approx(34 * sbh / t, rel=1e-12)
    assert theirs(False, "full", False) == 2 * sbh
    assert theirs(True, "full", False) == 2 * sbh / t


def kept_by_a_model(tp: int, sequence_parallel: bool) -> int:
    model = mk.GPT(GPT2, context_of(tp, sequence_parallel), compute_dtype=torch.bfloat16)
    tokens = torch.randint(0, 60, (B, T), generator=torch.Generator().manual_seed(0))
    births = Births(list(model.parameters()))  # token ids count: the formula has them
    with births:
        tokens, targets = tokens.clone(), tokens.clone()
        loss = model(tokens, targets, dropout_key=DropoutKey(1, 1))
    del targets
    count = births.alive()
    loss.backward()
    return count


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["1", "2", "2 and sp"])
def test_a_model_keeps_what_the_formula_says(ranks, tp, sequence_parallel):
    layout = (tp, sequence_parallel)
    wanted = activation_bytes(GPT2, B, tp=tp, sequence_parallel=sequence_parallel).kept
    for count in [kept_by_a_model(*layout)] if tp == 1 else ranks.run(kept_by_a_model, tp, *layout):
        assert count == pytest.approx(wanted, rel=0.1)


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match="recompute must be one of none, selective, full, got 'some'"):
        activation_bytes(GPT2, 1, recompute="some")
    with pytest.raises(ConfigError, match="recompute_modules must be some of attention, mlp, norm, got attn"):
        activation_bytes(GPT2, 1, recompute="selective", recompute_modules=("attn",))
    with pytest.raises(ConfigError, match="31 tokens are not divisible by tp = 2, which sequence parallelism needs"):
        activation_bytes(GPT2, 1, tokens=31, tp=2, sequence_parallel=True)
