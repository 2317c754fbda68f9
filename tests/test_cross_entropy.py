"""cross_entropy: one process, and the vocabulary over two and four gloo ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import megakern as mk
from megakern.kernels.torch import cross_entropy as kernel
from megakern.ops.cross_entropy import cross_entropy_reference
from tests.closeness import FLOOR, assert_close_to_ref, assert_gradients_close

# (shape of targets, V): smallest, one row, primes, several row blocks (BLOCK is lowered), no rows, no leading dim.
SHAPES = [((1,), 1), ((1,), 768), ((7,), 13), ((3, 5), 127), ((129,), 33), ((0,), 8), ((), 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 512)


def make(shape, V, dtype=torch.float32, *, vocab_size=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn((*shape, V), generator=g) * 3).to(dtype)
    targets = torch.randint(0, vocab_size or V, shape, generator=g)
    if targets.numel() > 2:
        targets.view(-1)[1::4] = -100
    return logits, targets


def compare(logits, targets, floor=None, **options):
    assert_gradients_close(
        lambda logits: mk.cross_entropy(logits, targets, **options),
        lambda logits: cross_entropy_reference(logits, targets, **options),
        {"logits": logits},
        floor=floor,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, V", SHAPES)
def test_loss_and_gradient(shape, V, dtype):
    for reduction in ("sum", "none"):
        compare(*make(shape, V, dtype), reduction=reduction)
    vocab_size = max(1, V - 3)
    logits, targets = make(shape, V, dtype, vocab_size=vocab_size)
    compare(logits, targets, label_smoothing=0.1, z_loss=1e-2, vocab_size=vocab_size, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_matches_torch(reduction, label_smoothing, ignore_index):
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    logits, targets = make((9,), 6, torch.float64)
    targets = targets.where(targets >= 0, 2)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = mk.cross_entropy(ours, targets, **options), F.cross_entropy(theirs, targets, **options)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_nothing_counted_is_nan_with_zero_gradient_as_in_torch():
    logits, targets = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    assert F.cross_entropy(logits, targets).isnan()
    loss = mk.cross_entropy(logits, targets)
    assert loss.isnan()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros(3, 4))
    assert mk.cross_entropy(logits[:0], targets[:0]).isnan()
    assert mk.cross_entropy(logits, targets, reduction="sum") == 0


def test_z_loss_is_its_formula():
    logits, targets = make((5,), 7, torch.float64)
    with_z = mk.cross_entropy(logits, targets, z_loss=0.5, reduction="none")
    without = mk.cross_entropy(logits, targets, reduction="none")
    expected = 0.5 * logits.exp().sum(-1).log() ** 2 * (targets != -100)
    torch.testing.assert_close(with_z - without, expected)


def test_padding_columns_do_not_count_whatever_they_hold():
    logits, targets = make((6,), 8, vocab_size=5)
    logits[:, 5:] = torch.tensor([float("nan"), 1e30, float("inf")])
    logits.requires_grad_()
    options = {"label_smoothing": 0.2, "z_loss": 0.1}
    loss = mk.cross_entropy(logits, targets, vocab_size=5, **options)
    loss.backward()
    cut = logits.detach()[:, :5].clone().requires_grad_()
    expected = cross_entropy_reference(cut, targets, **options)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, F.pad(cut.grad, (0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_and_masked_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0], [300.0, 300.0, 301.0]], dtype=dtype)
    targets = torch.tensor([0, 2, 1])
    # lse is kept in fp32: half a unit in the last place of 301, 1.5e-5, is a relative error of the softmax.
    compare(logits, targets, floor=max(2e-5, FLOOR[dtype]))
    assert mk.cross_entropy(torch.full((1, 3), float("-inf")), torch.tensor([1])).isnan()


def test_strided_logits():
    logits, targets = make((4, 6), 10)
    compare(logits.transpose(0, 1), targets.t())
    compare(logits[..., ::2], targets.clamp(max=4))


def test_reference_passes_gradcheck():
    logits, targets = make((5,), 4, torch.float64)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "vocab_size": 3}
    targets = targets.clamp(max=2)
    torch.autograd.gradcheck(lambda v: cross_entropy_reference(v, targets, **options), logits.requires_grad_())


def test_opcheck():
    for dtype, smoothing in itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)):
        logits, targets = make((2, 3), 7, dtype)
        options = (-100, smoothing, 0.01, 6, "", "torch")
        targets = targets.clamp(max=5)
        library.opcheck(torch.ops.megakern.cross_entropy.default, (logits.requires_grad_(), targets, *options))
        backward = (torch.ones(2, 3), logits.detach(), targets, logits.detach().float().logsumexp(-1), *options)
        library.opcheck(torch.ops.megakern.cross_entropy_backward.default, backward)


def test_compiles_in_one_graph():
    logits, targets = make((5,), 9)

    def loss(logits):
        return mk.cross_entropy(logits * 2, targets, label_smoothing=0.1)

    assert_gradients_close(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, {"logits": logits})


def test_repeats_are_bit_identical():
    logits, targets = make((64,), 33)
    assert torch.equal(mk.cross_entropy(logits, targets), mk.cross_entropy(logits, targets))


def test_backward_allocates_one_tensor_of_the_size_of_the_logits():
    """Every operation of a bf16 backward is watched; views of the same memory count once."""
    large = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.nbytes >= 64 * 4096:
                large.add(out.untyped_storage().data_ptr())
            return out

    logits, targets = make((64,), 4096, torch.bfloat16)
    lse = logits.float().logsumexp(-1)
    with Watch():
        dlogits = kernel.cross_entropy_backward(torch.ones(64), logits, targets, lse, -100, 0.1, 0.1, 4096, "")
    assert large - {logits.untyped_storage().data_ptr()} == {dlogits.untyped_storage().data_ptr()}


# --- vocabulary-parallel ---

PARALLEL_CASES = [
    # (V, vocab_size, options): plain, all options with padding on the last rank, ranks of nothing but padding
    (16, None, {}),
    (16, 15, {"label_smoothing": 0.2, "z_loss": 0.05, "reduction": "none"}),
    (16, 3, {"label_smoothing": 0.2, "z_loss": 0.05, "reduction": "mean"}),
]


def run_parallel(V, vocab_size, options, dtype, compiled) -> tuple:
    group = dist.group.WORLD
    logits, targets = make((3, 5), V, dtype, vocab_size=vocab_size)
    logits[0, 0, : V // 2] = float("-inf") if not options.get("label_smoothing") else -1e4
    targets[0, 0] = V // 2 if vocab_size is None else 0
    local = logits.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()

    def loss_of(local):
        return mk.cross_entropy(local, targets, group=group, vocab_size=vocab_size, **options)

    loss = (torch.compile(loss_of, fullgraph=True, backend="aot_eager") if compiled else loss_of)(local)
    (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
    return loss.detach(), local.grad, logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("V, vocab_size, options", PARALLEL_CASES)
def test_vocabulary_parallel(ranks, size, V, vocab_size, options, dtype):
    results = ranks.run(run_parallel, size, V, vocab_size, options, dtype, False)
    _, _, logits, targets = results[0]
    expected, gradients = {}, {}
    for precision in (torch.float64, dtype):
        whole = logits.to(precision).requires_grad_()
        loss = cross_entropy_reference(whole, targets, vocab_size=vocab_size, **options)
        (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
        expected[precision], gradients[precision] = loss.detach(), whole.grad
    for loss, _, _, _ in results:
        assert_close_to_ref(loss, expected[torch.float64], expected[dtype])
        assert torch.equal(loss, results[0][0])
    gathered = torch.cat([gradient for _, gradient, _, _ in results], -1)
    assert_close_to_ref(gathered, gradients[torch.float64], gradients[dtype], name="gradient")


def test_compiles_with_a_group():
    """One rank, in this process: what is tried is the tracing of the group, and one rank starts no second process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        eager = run_parallel(*PARALLEL_CASES[1], torch.float32, False)
        compiled = run_parallel(*PARALLEL_CASES[1], torch.float32, True)
    finally:
        dist.destroy_process_group()
    for ours, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def count_collectives() -> tuple[list[str], float]:
    calls, real = [], kernel.all_reduce_in_place

    def counted(tensor, group, op=dist.ReduceOp.SUM):
        calls.append(f"{op.name if hasattr(op, 'name') else op} {tuple(tensor.shape)}")
        return real(tensor, group, op)

    kernel.all_reduce_in_place = counted
    try:
        loss = mk.cross_entropy(torch.zeros(6, 4), torch.arange(6), group=dist.group.WORLD, label_smoothing=0.1)
    finally:
        kernel.all_reduce_in_place = real
    return calls, float(loss)


def test_one_max_and_one_sum_cross_ranks(ranks):
    for calls, loss in ranks.run(count_collectives, 2):
        assert [call.split(" ", 1)[1] for call in calls] == ["(6,)", "(3, 6)"] and "MAX" in calls[0]
        assert abs(loss - torch.tensor(8.0).log().item()) < 1e-6


def refuse_in_parallel() -> list[str]:
    group, texts = dist.group.WORLD, []
    for target, vocab_size in ((8, None), (7, 7), (-1, None)):
        with pytest.raises(IndexError, match="cross_entropy: targets must be in") as error:
            mk.cross_entropy(torch.zeros(2, 4), torch.tensor([0, target]), group=group, vocab_size=vocab_size)
        texts.append(str(error.value))
    with pytest.raises(ValueError, match="vocab_size must be from 1 to the 8 columns of all ranks, got 9"):
        mk.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), group=group, vocab_size=9)
    return texts


def test_targets_are_checked_against_the_whole_vocabulary(ranks):
    for texts in ranks.run(refuse_in_parallel, 2):
        assert "[0, 8)" in texts[0] and "got 8 in row 1" in texts[0] and "[0, 7)" in texts[1] and "got -1" in texts[2]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"targets": torch.tensor([0, 4])}, IndexError, r"targets must be in \[0, 4\) or ignore_index = -100, got 4"),
        ({"targets": torch.tensor([0, -1])}, IndexError, "got -1 in row 1"),
        ({"targets": torch.tensor([0, 3]), "vocab_size": 3}, IndexError, r"targets must be in \[0, 3\)"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must have shape .* = \(2,\), got \(1,\)"),
        ({"targets": torch.tensor([0, 1]).int()}, TypeError, "targets must be int64 class indices, got torch.int32"),
        ({"targets": torch.tensor([0, 1], device="meta")}, ValueError, "targets must be on the device of logits"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \(\.\.\., V\), got \(\)"),
        ({"logits": torch.zeros(2, 4).int()}, TypeError, "logits must be float16, bfloat16, float32 or float64"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "the vocabulary must have at least one column"),
        ({"vocab_size": 5}, ValueError, "vocab_size must be from 1 to the 4 columns of all ranks, got 5"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be from 1 to the 4 columns of all ranks, got 0"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be 0 or more and finite, got -1.0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got 0.5"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"logits": torch.zeros(2, 4), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message):
        mk.cross_entropy(**arguments)
