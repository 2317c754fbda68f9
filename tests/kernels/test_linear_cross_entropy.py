"""The linear + cross-entropy of every compiled backend against float64, in one chunk and in several."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import library

import megakern as mk
from megakern.kernels.cuda import linear as cuda_linear
from megakern.kernels.cuda.linear_plan import NN, NT, TN
from megakern.kernels.torch import linear_cross_entropy as chunks
from megakern.kernels.triton import configs
from megakern.ops.linear_cross_entropy import linear_cross_entropy_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw, fenced
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


@pytest.fixture
def made_by_ours(monkeypatch):
    """What csrc/linear.cu multiplies in a test: (layout, added to what was there), in order."""
    made, product = [], cuda_linear.product

    def recorded(layout, *arguments, accumulate=False, **more):
        made.append((layout, accumulate))
        product(layout, *arguments, accumulate=accumulate, **more)

    monkeypatch.setattr(cuda_linear, "product", recorded)
    return made


@pytest.fixture
def chunks_of(device, monkeypatch):
    """`chunks_of(rows, V)`: so many rows of bf16 or fp16 logits at a time."""
    return lambda rows, V: monkeypatch.setitem(chunks.CHUNK_BYTES, device, rows * V * 2)


# (M, K, V, real columns, rows of a chunk): a tile is 64 or 128 x 128 or 256, 16 bytes are 8 columns; one row a chunk.
IN_CHUNKS = [
    (150, 136, 264, 264, 64),
    (70, 72, 301, 301, 33),
    (33, 8, 144, 129, 32),
    (3, 16, 13, 10, 1),
    (1, 8, 1, 1, 9),
]


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M, K, V, vocab_size, rows", IN_CHUNKS)
def test_our_products(M, K, V, vocab_size, rows, dtype, reduction, device, backend, made_by_ours, chunks_of):
    chunks_of(rows, V)
    inputs, targets = make((M,), K, V, dtype, device, vocab_size=vocab_size)
    inputs["weight"] /= K**0.5
    check(backend, inputs, targets, vocab_size=vocab_size, label_smoothing=0.1, reduction=reduction)
    forward, backward = [(NT, False)], [(NN, False), (TN, True)]
    first, more = (forward + backward[:1] + [(TN, False)], forward + backward)
    count = -(-M // rows)
    expected = first + more * (count - 1)
    assert made_by_ours == (expected if reduction == "sum" else forward * count + expected)


@pytest.mark.only("cuda", "simt")
def test_what_lies_beside_the_operands_never_leaks_in(device, backend, made_by_ours, chunks_of):
    """Rows of NaN around x and weight, which do not start on 16 bytes, and in the padding of weight."""
    chunks_of(8, 24)
    inputs, targets = make((19,), 16, 24, torch.bfloat16, device, vocab_size=19)
    inputs["weight"][19:] = float("nan")
    results = []
    for values in (inputs, {name: fenced(value, before=3) for name, value in inputs.items()}):
        leaves = [value.requires_grad_() for value in values.values()]
        loss = mk.linear_cross_entropy(*leaves, targets, vocab_size=19, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert len(made_by_ours) == 2 * 3 * 3
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    assert not results[0][2][19:].any()


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize("dtype, K", [(torch.float32, 16), (torch.bfloat16, 12)])
def test_what_our_products_cannot_do_is_done_by_pytorch_and_said(dtype, K, device, backend, made_by_ours):
    inputs, targets = make((9,), K, 24, dtype, device)
    check(backend, inputs, targets)
    assert not made_by_ours
    said = mk.explain("linear_cross_entropy", *inputs.values(), targets, backend=backend).reasons[backend]
    why = "take bfloat16, float16, not torch.float32" if K == 16 else "K must be a multiple of 8, got 12"
    assert "matrix products by PyTorch (linear: its C++ kernel" in said and why in said


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


# It starts four processes; test_cross_entropy.py tries the same collectives.
@pytest.mark.slow
@pytest.mark.parametrize("dtype, K", [(torch.float32, 6), (torch.float16, 8)])  # simt: the second by csrc/linear.cu
@pytest.mark.parametrize("vocab_size", [24, 7])  # no padding, and ranks with nothing but padding
def test_the_vocabulary_over_ranks(vocab_size, dtype, K, ranks, device, backend):
    if device != "cpu":
        pytest.skip("the pool's gloo ranks hold CPU tensors")
    inputs, targets = make((5,), K, 24, dtype, device, vocab_size=vocab_size)
    results = ranks.run(_on_a_rank, 4, *inputs.values(), targets, vocab_size, backend)
    (expected, *wide), (same, *narrow) = (
        _whole(inputs, targets, vocab_size, dtype) for dtype in (torch.float64, dtype)
    )
    for loss, _, _ in results:
        assert_close_to_ref(loss, expected, same)
    partial_sums = sum(own.float() for _, own, _ in results).to(dtype)  # each rank has one
    assert_close_to_ref(partial_sums, wide[0], narrow[0], name="dx")
    assert_close_to_ref(torch.cat([own for _, _, own in results]), wide[1], narrow[1], name="dweight")


def _whole(inputs, targets, vocab_size, dtype):
    """-> the reference's loss, dx and dweight on one rank."""
    leaves = [value.to(dtype).requires_grad_() for value in inputs.values()]
    loss = linear_cross_entropy_reference(*leaves, targets, vocab_size=vocab_size, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_opcheck_and_compile(device, unguarded, backend):
    inputs, targets = make((2, 3), 5, 11, torch.float32, device)
    arguments = [value.requires_grad_() for value in inputs.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.megakern.linear_cross_entropy_sum.default
    library.opcheck(op, (*arguments, targets, True, True, -100, 0.1, 0.0, 11, "", backend), test_utils=tests)
    ours = partial(mk.linear_cross_entropy, targets=targets, backend=backend)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, partial(linear_cross_entropy_reference, targets=targets), inputs)
