"""The Triton cross-entropy against float64, on one rank and with the vocabulary over ranks. Interpreter, or a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

import megakern as mk
from megakern.kernels.torch.cross_entropy import Shard
from megakern.kernels.triton.cross_entropy import row_losses, write_gradient
from megakern.ops.cross_entropy import cross_entropy_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

pytestmark = pytest.mark.only("triton")

# (shape of targets, V): smallest, primes, beside one piece of the vocabulary (4096) and over several, none.
SHAPES = [((1,), 1), ((7,), 13), ((2, 3), 127), ((2,), 4096), ((2,), 4097), ((1,), 12289), ((0,), 8), ((), 5)]


def make(shape, V, device, dtype=torch.float32, vocab_size=None):
    logits = draw(*shape, V, dtype=dtype, device=device, scale=3.0)
    targets = torch.randint(0, vocab_size or V, shape, generator=torch.Generator().manual_seed(1)).to(device)
    if targets.numel() > 2:
        targets.view(-1)[1::4] = -100
    return logits, targets


def check(logits, targets, floor=None, **options):
    assert_gradients_close(
        lambda logits: mk.cross_entropy(logits, targets, backend="triton", **options),
        lambda logits: cross_entropy_reference(logits, targets, **options),
        {"logits": logits},
        floor=floor,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, V", SHAPES)
def test_loss_and_gradient(shape, V, dtype, device):
    check(*make(shape, V, device, dtype), reduction="sum")
    vocab_size = max(1, V - 3)
    logits, targets = make(shape, V, device, dtype, vocab_size)
    check(logits, targets, label_smoothing=0.1, z_loss=1e-2, vocab_size=vocab_size, reduction="none")


def test_mean_and_another_ignore_index(device):
    logits, targets = make((5,), 9, device)
    check(logits, targets.where(targets >= 0, 2), ignore_index=2)


def test_all_rows_ignored_give_no_gradient_even_from_nan(device):
    logits = torch.full((2, 9), float("nan"), device=device, requires_grad=True)
    targets = torch.full((2,), -100, device=device)
    loss = mk.cross_entropy(logits, targets, reduction="sum", backend="triton")
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_far_logits_and_minus_infinity(device):
    logits, targets = make((4,), 9000, device)
    logits += torch.linspace(-300, 300, 9000, device=device)
    logits[:, ::7] = float("-inf")
    targets = torch.tensor([8999, 8998, 8997, 1], device=device)
    check(logits, targets, reduction="none", floor=1e-4)  # lse is saved in fp32: near 300 it is a multiple of 3e-5


@pytest.mark.parametrize("V", [33, 5000])
def test_nan_beside_the_rows_and_in_padding_never_leaks_in(V, device):
    logits, targets = make((6,), V, device, vocab_size=V - 2)
    results = []
    for values in (logits, fenced(logits)):
        values[:, V - 2 :] = float("nan")
        values.requires_grad_()
        options = {"vocab_size": V - 2, "label_smoothing": 0.1}
        loss = mk.cross_entropy(values, targets, backend="triton", **options)
        results.append((loss, *torch.autograd.grad(loss, values)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_the_gradient_may_be_written_over_the_logits(device):
    logits, targets = make((5,), 5000, device)
    options = (-100, 0.1, 1e-3, 5000, Shard(None, 0, 5000))
    _, lse = row_losses(logits, targets, *options)
    scale = draw(5, device=device, seed=3)
    apart = torch.empty_like(logits)
    write_gradient(apart, scale, logits, targets, lse, *options)
    write_gradient(logits, scale, logits, targets, lse, *options)
    assert torch.equal(apart, logits)


def test_a_target_outside_the_vocabulary(device):
    logits, targets = make((3,), 8, device)
    targets[0] = 8
    if device == "cpu":
        with pytest.raises(IndexError, match=r"targets must be in \[0, 8\) or ignore_index = -100, got 8 in row 0"):
            mk.cross_entropy(logits, targets, backend="triton")
    losses, _ = row_losses(logits, targets, -100, 0.0, 0.0, 8, Shard(None, 0, 8))
    assert losses[0].isnan() and losses[1:].isfinite().all()


def _on_a_rank(logits, targets, options):
    group = dist.group.WORLD
    own = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    loss = mk.cross_entropy(own, targets, group=group, reduction="none", backend="triton", **options)
    loss.sum().backward()
    return loss.detach(), own.grad


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not part of this PyTorch")
@pytest.mark.parametrize("vocab_size", [40, 29, 8])  # no padding, some, and two ranks with nothing but padding
def test_the_vocabulary_over_ranks(vocab_size, ranks, device):
    if device != "cpu":
        pytest.skip("the pool's gloo ranks hold CPU tensors")
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": vocab_size}
    logits, targets = make((7,), 40, device, vocab_size=vocab_size)
    results = ranks.run(_on_a_rank, 4, logits, targets, options)
    wide = logits.double().requires_grad_()
    expected = cross_entropy_reference(wide, targets, reduction="none", **options)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    for loss, _ in results:
        assert_close_to_ref(loss, expected.detach(), expected.detach().float())
    assert_close_to_ref(torch.cat([own for _, own in results], -1), gradient, gradient.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_opcheck_compile_and_repeat(smoothing, device, unguarded):
    logits, targets = make((2, 3), 11, device)
    arguments = (logits.requires_grad_(), targets, -100, smoothing, 1e-3, 11, "", "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megakern.cross_entropy.default, arguments, test_utils=tests)
    op = partial(mk.cross_entropy, targets=targets, label_smoothing=smoothing, backend="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), op(logits)) and torch.equal(op(logits), op(logits))
