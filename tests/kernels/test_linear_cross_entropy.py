"""The linear + cross-entropy of every compiled backend against float64, in one chunk and in several."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

import megakern as mk
from megakern.kernels.torch import linear_cross_entropy as chunks
from megakern.kernels.triton import configs
from megakern.ops.linear_cross_entropy import linear_cross_entropy_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw
from tests.kernels.test_linear import DTYPES

OP = "linear_cross_entropy"

# (shape of targets, K, V): smallest, primes, beside a tile of 64, no rows.
SHAPES = [((1,), 1, 1), ((7,), 5, 13), ((2, 33), 64, 65), ((0,), 4, 8)]


def make(shape, K, V, dtype, device, vocab_size=None):
    x = draw(*shape, K, dtype=dtype, device=device)
    weight = draw(V, K, dtype=dtype, device=device, seed=1)
    targets = torch.randint(0, vocab_size or V, shape, generator=torch.Generator().manual_seed(2)).to(device)
    if targets.numel() > 2:
        targets.view(-1)[1::4] = -100
    return {"x": x, "weight": weight}, targets


def check(backend, inputs, targets, **options):
    ours = partial(mk.linear_cross_entropy, targets=targets, backend=backend, **options)
    assert_gradients_close(ours, partial(linear_cross_entropy_reference, targets=targets, **options), inputs)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, K, V", SHAPES)
def test_loss_and_gradients(shape, K, V, dtype, reduction, device, backend):
    check(backend, *make(shape, K, V, dtype, device), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [1, 5, 11])
def test_chunks_of_rows(rows, reduction, device, monkeypatch, backend):
    if backend == "triton":
        monkeypatch.setattr(configs, "logits_rows", lambda V, element_size: rows)
    else:
        monkeypatch.setitem(chunks.CHUNK_BYTES, device, rows * 20 * 4)
    inputs, targets = make((11,), 6, 20, torch.float32, device, vocab_size=17)
    check(backend, inputs, targets, vocab_size=17, label_smoothing=0.1, z_loss=1e-2, reduction=reduction)


def test_only_what_is_wanted_is_made(device, backend):
    inputs, targets = make((6,), 5, 9, torch.float32, device)
    for name in inputs:
        leaves = {key: value.clone().requires_grad_(key == name) for key, value in inputs.items()}
        mk.linear_cross_entropy(**leaves, targets=targets, backend=backend).backward()
        assert [key for key, leaf in leaves.items() if leaf.grad is not None] == [name]
    loss = mk.linear_cross_entropy(**inputs, targets=targets, backend=backend)
    wide = {name: value.double() for name, value in inputs.items()}
    torch.testing.assert_close(loss.double(), linear_cross_entropy_reference(**wide, targets=targets))


def test_bytes_of_a_chunk_of_logits():
    assert configs.logits_rows(131072, 2) == 2048 and configs.logits_rows(1 << 30, 4) == 1


def _on_a_rank(x, weight, targets, vocab_size, backend):
    group = dist.group.WORLD
    own = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    x = x.clone().requires_grad_()
    options = {"group": group, "vocab_size": vocab_size, "reduction": "sum", "backend": backend}
    loss = mk.linear_cross_entropy(x, own, targets, **options)
    loss.backward()
    return loss.detach(), x.grad, own.grad


@pytest.mark.slow  # it starts four processes; test_cross_entropy.py tries the same collectives
@pytest.mark.parametrize("vocab_size", [24, 7])  # no padding, and ranks with nothing but padding
def test_the_vocabulary_over_ranks(vocab_size, ranks, device, backend):
    if device != "cpu":
        pytest.skip("the pool's gloo ranks hold CPU tensors")
    inputs, targets = make((5,), 6, 24, torch.float32, device, vocab_size=vocab_size)
    results = ranks.run(_on_a_rank, 4, *inputs.values(), targets, vocab_size, backend)
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    expected = linear_cross_entropy_reference(**wide, targets=targets, vocab_size=vocab_size, reduction="sum")
    dx, dweight = torch.autograd.grad(expected, list(wide.values()))
    for loss, _, _ in results:
        assert_close_to_ref(loss, expected.detach(), expected.detach().float())
    assert_close_to_ref(sum(own for _, own, _ in results), dx, dx.float())  # each rank has a partial sum
    assert_close_to_ref(torch.cat([own for _, _, own in results]), dweight, dweight.float())


def test_opcheck_and_compile(device, unguarded, backend):
    inputs, targets = make((2, 3), 5, 11, torch.float32, device)
    arguments = [value.requires_grad_() for value in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.megakern.linear_cross_entropy_sum.default
    torch.library.opcheck(op, (*arguments, targets, True, True, -100, 0.1, 0.0, 11, "", backend), test_utils=tests)
    ours = partial(mk.linear_cross_entropy, targets=targets, backend=backend)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, partial(linear_cross_entropy_reference, targets=targets), inputs)
