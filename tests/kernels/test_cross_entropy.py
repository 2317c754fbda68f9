"""The cross-entropy of every compiled backend against float64, on one rank and with the vocabulary over ranks."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import library

import megakern as mk
from megakern.kernels.torch.cross_entropy import Shard
from megakern.ops.cross_entropy import cross_entropy_reference
from megakern.ops.dispatch import launcher
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

OP = "cross_entropy"

# (shape of targets, V): smallest, primes, beside one piece of the vocabulary (4096) and over several, none. 4097 and
# 12289 columns leave the second row at an address that is no multiple of 16 bytes.
SHAPES = [((1,), 1), ((7,), 13), ((2, 3), 127), ((2,), 4096), ((2,), 4097), ((1,), 12289), ((0,), 8), ((), 5)]


def make(shape, V, device, dtype=torch.float32, vocab_size=None):
    logits = draw(*shape, V, dtype=dtype, device=device, scale=3.0)
    targets = torch.randint(0, vocab_size or V, shape, generator=torch.Generator().manual_seed(1)).to(device)
    if targets.numel() > 2:
        targets.view(-1)[1::4] = -100
    return logits, targets


def parts(backend):
    """-> row_losses, write_gradient"""
    return tuple(launcher(backend, "cross_entropy", name) for name in ("row_losses", "write_gradient"))


def check(backend, logits, targets, floor=None, **options):
    assert_gradients_close(
        lambda logits: mk.cross_entropy(logits, targets, backend=backend, **options),
        lambda logits: cross_entropy_reference(logits, targets, **options),
        {"logits": logits},
        floor=floor,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, V", SHAPES)
def test_loss_and_gradient(shape, V, dtype, device, backend):
    check(backend, *make(shape, V, device, dtype), reduction="sum")
    vocab_size = max(1, V - 3)
    logits, targets = make(shape, V, device, dtype, vocab_size)
    check(backend, logits, targets, label_smoothing=0.1, z_loss=1e-2, vocab_size=vocab_size, reduction="none")


def test_mean_and_another_ignore_index(device, backend):
    logits, targets = make((5,), 9, device)
    check(backend, logits, targets.where(targets >= 0, 2), ignore_index=2)


def test_all_rows_ignored_give_no_gradient_even_from_nan(device, backend):
    logits = torch.full((2, 9), float("nan"), device=device, requires_grad=True)
    targets = torch.full((2,), -100, device=device)
    loss = mk.cross_entropy(logits, targets, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_far_logits_and_minus_infinity(device, backend):
    logits, targets = make((4,), 9000, device)
    logits += torch.linspace(-300, 300, 9000, device=device)
    logits[:, ::7] = float("-inf")
    targets = torch.tensor([8999, 8998, 8997, 1], device=device)
    check(
        backend, logits, targets, reduction="none", floor=1e-4
    )  # lse is saved in fp32: near 300 it is a multiple of 3e-5


@pytest.mark.parametrize("V", [33, 5000])
def test_nan_beside_the_rows_and_in_padding_never_leaks_in(V, device, backend):
    logits, targets = make((6,), V, device, vocab_size=V - 2)
    results = []
    for values in (logits, fenced(logits)):
        values[:, V - 2 :] = float("nan")
        values.requires_grad_()
        options = {"vocab_size": V - 2, "label_smoothing": 0.1}
        loss = mk.cross_entropy(values, targets, backend=backend, **options)
        results.append((loss, *torch.autograd.grad(loss, values)))
    for one, other in zip(*results, strict=True):  # the order of sums may depend on the addresses
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
        assert one.isfinite().all()


def test_the_gradient_may_be_written_over_the_logits(device, backend):
    logits, targets = make((5,), 5000, device)
    options = (-100, 0.1, 1e-3, 5000, Shard(None, 0, 5000))
    row_losses, write_gradient = parts(backend)
    _, lse = row_losses(logits, targets, *options)
    scale = draw(5, device=device, seed=3)
    apart = torch.empty_like(logits)
    write_gradient(apart, scale, logits, targets, lse, *options)
    write_gradient(logits, scale, logits, targets, lse, *options)
    assert torch.equal(apart, logits)


def test_a_target_outside_the_vocabulary(device, backend):
    logits, targets = make((3,), 8, device)
    targets[0] = 8
    if device == "cpu":
        with pytest.raises(IndexError, match=r"targets must be in \[0, 8\) or ignore_index = -100, got 8 in row 0"):
            mk.cross_entropy(logits, targets, backend=backend)
    losses, _ = parts(backend)[0](logits, targets, -100, 0.0, 0.0, 8, Shard(None, 0, 8))
    assert losses[0].isnan() and losses[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_place(reduction, dtype, device, backend):
    for shape, V in SHAPES:
        if reduction == "mean" and 0 in shape:
            continue  # NaN, as in PyTorch
        vocab_size = max(1, V - 3)
        logits, targets = make(shape, V, device, dtype, vocab_size)
        options = {"label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": vocab_size, "reduction": reduction}
        ours = partial(mk.cross_entropy, targets=targets, in_place=True, backend=backend, **options)
        assert_gradients_close(
            lambda logits, ours=ours: ours(logits * 1),
            partial(cross_entropy_reference, targets=targets, **options),
            {"logits": logits},
        )


# Multiprocessors and bytes of shared memory of a chip: rows in shared memory, several a block; in registers too; with a
# rest that is read again; with no shared memory at all.
CHIPS = [(2, 227 << 10), (2, 1024 + 2 * 16 * 512), (1, 1024)]


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [30, 4099, 61000])
def test_where_a_row_is_kept_changes_no_bit(V, dtype, device, backend, monkeypatch):
    """The fused kernel, on every kind of chip, against float64 and the two kernels that read the logits twice."""
    from megakern.kernels.cuda import cross_entropy as kernel

    M, real = 7, V - 5
    logits, targets = make((M,), V, device, dtype, real)
    logits[1::4] = float("nan")  # of ignored rows
    options = (-100, 0.1, 1e-3, real, Shard(None, 0, real))
    scale = draw(M, device=device, seed=3)
    row_losses, write_gradient = parts(backend)
    loss, lse = row_losses(logits, targets, *options)
    expected = torch.empty_like(logits)
    write_gradient(expected, scale, logits, targets, lse, *options)
    results = []
    for chip in CHIPS:
        monkeypatch.setattr(kernel, "chip", lambda device, chip=chip: chip)
        for one, other in zip(row_losses(logits, targets, *options), (loss, lse), strict=True):
            assert torch.equal(one, other)
        for out in (torch.full_like(logits, float("nan")), logits.clone()):
            source = logits if out[0, 0].isnan() else out
            assert torch.equal(kernel.loss_and_gradient(out, scale, source, targets, *options), loss)
            results.append(out)
    chosen = kernel.plan(M, real, logits.element_size(), *CHIPS[0])
    for ahead in {0, min(1, chosen.ahead), chosen.ahead // 2}:  # of blocks that have several rows
        monkeypatch.setattr(kernel, "plan", lambda *_, n=ahead: dataclasses.replace(chosen, ahead=n, blocks=2))
        results.append(logits.clone())
        assert torch.equal(kernel.loss_and_gradient(results[-1], scale, results[-1], targets, *options), loss)
    assert all(torch.equal(results[0], other) for other in results[1:])
    largest = expected.float().abs().max().item()
    torch.testing.assert_close(
        results[0].float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * largest
    )


@pytest.mark.only("cuda", "simt")
def test_the_plan_uses_the_chip_and_explain_shows_it(device, backend):
    from megakern.kernels.cuda import cross_entropy

    plan = cross_entropy.plan
    h200 = (132, 227 << 10)
    assert plan(8192, 131072, 2, *h200).read_again == 0 and plan(8192, 151936, 2, *h200).read_again == 0
    assert plan(8192, 32000, 2, *h200).blocks == 3 * 132 and plan(8, 32000, 2, *h200).blocks == 8
    assert plan(8192, 131072, 2, *h200).ahead == 6 and plan(8192, 32000, 2, *h200).ahead == 2
    for V in range(8, 300_000, 4099):
        chosen = plan(8192, V, 2, *h200)
        together = chosen.blocks // 132
        used = cross_entropy.SUMS_BYTES + 16 * chosen.threads * (chosen.kept + chosen.ahead) + 1024
        assert chosen.ahead <= chosen.kept and together * used <= 228 << 10, (V, chosen)
    assert 0 < plan(8192, 262144, 2, *h200).read_again < 0.5
    logits, targets = make((7,), 13, device)
    text = str(mk.explain("cross_entropy", logits, targets, in_place=True, backend=backend))
    assert "loss and gradient in one pass: 7 blocks of 128 threads" in text


def test_a_factor_in_place(device, backend):
    scale_ = launcher(backend, "cross_entropy", "scale_")
    for dtype, size in zip(DTYPES, (1, 5000, 40003), strict=True):
        x = draw(size + 3, dtype=dtype, device=device)[3:]
        for factor in (torch.tensor(1 / 3, device=device), torch.tensor(1.0, device=device)):
            expected = (x.float() * factor).to(dtype)
            scale_(x, factor)
            torch.testing.assert_close(x, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_strided_targets(device, backend):
    logits, targets = make((6,), 9, device)
    wide = torch.stack([targets, targets.flip(0) + 100], 1)
    check(backend, logits, wide[:, 0])


def _on_a_rank(logits, targets, options, backend):
    group = dist.group.WORLD
    own = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    loss = mk.cross_entropy(own, targets, group=group, reduction="none", backend=backend, **options)
    loss.sum().backward()
    options = {**options, "reduction": "sum", "in_place": True}
    total = mk.cross_entropy(own * 1, targets, group=group, backend=backend, **options)
    (gradient,) = torch.autograd.grad(total, own)
    torch.testing.assert_close(total, loss.sum())
    torch.testing.assert_close(gradient, own.grad)
    return loss.detach(), own.grad


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not part of this PyTorch")
@pytest.mark.parametrize("vocab_size", [40, 29, 8])  # no padding, some, and two ranks with nothing but padding
def test_the_vocabulary_over_ranks(vocab_size, ranks, device, backend):
    if device != "cpu":
        pytest.skip("the pool's gloo ranks hold CPU tensors")
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "vocab_size": vocab_size}
    logits, targets = make((7,), 40, device, vocab_size=vocab_size)
    results = ranks.run(_on_a_rank, 4, logits, targets, options, backend)
    wide = logits.double().requires_grad_()
    expected = cross_entropy_reference(wide, targets, reduction="none", **options)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    for loss, _ in results:
        assert_close_to_ref(loss, expected.detach(), expected.detach().float())
    assert_close_to_ref(torch.cat([own for _, own in results], -1), gradient, gradient.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_opcheck_compile_and_repeat(smoothing, device, unguarded, backend):
    logits, targets = make((2, 3), 11, device)
    arguments = (logits.requires_grad_(), targets, -100, smoothing, 1e-3, 11, "", backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.megakern.cross_entropy.default, arguments, test_utils=tests)
    op = partial(mk.cross_entropy, targets=targets, label_smoothing=smoothing, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), op(logits)) and torch.equal(op(logits), op(logits))
