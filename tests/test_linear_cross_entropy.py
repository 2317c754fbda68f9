"""linear_cross_entropy: one process, and the vocabulary over two and four gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import megakern as mk
from megakern.kernels.torch import linear_cross_entropy as kernel
from megakern.ops.linear_cross_entropy import linear_cross_entropy_reference
from megakern.parallel.collectives import copy_to_tensor_parallel
from tests.closeness import assert_close_to_ref, assert_gradients_close

# (shape of targets, K, V): smallest, one row, primes, several chunks (their size is lowered), no rows, no leading dim.
SHAPES = [((1,), 1, 2), ((1,), 64, 33), ((7,), 5, 13), ((3, 5), 17, 127), ((65,), 8, 31), ((0,), 4, 8), ((), 3, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(kernel.CHUNK_BYTES, "cpu", 1024)


def make(shape, K, V, dtype=torch.float32, *, vocab_size=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((*shape, K), generator=g).to(dtype)
    weight = (torch.randn(V, K, generator=g) * 2 / K**0.5).to(dtype)
    targets = torch.randint(0, vocab_size or V, shape, generator=g)
    if targets.numel() > 2:
        targets.view(-1)[1::4] = -100
    return {"x": x, "weight": weight}, targets


def compare(inputs, targets, **options):
    assert_gradients_close(
        lambda x, weight: mk.linear_cross_entropy(x, weight, targets, **options),
        lambda x, weight: linear_cross_entropy_reference(x, weight, targets, **options),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape, K, V", SHAPES)
def test_loss_and_gradients(shape, K, V, reduction, dtype):
    compare(*make(shape, K, V, dtype), reduction=reduction)
    vocab_size = max(1, V - 3)
    inputs, targets = make(shape, K, V, dtype, vocab_size=vocab_size)
    compare(inputs, targets, reduction=reduction, vocab_size=vocab_size, **ALL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_strided_inputs(dtype):
    inputs, targets = make((4, 6), 10, 12, dtype)
    compare(inputs, targets, **ALL)
    inputs["x"] = inputs["x"].transpose(0, 1)
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    compare(inputs, targets.t(), **ALL)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", ["x", "weight"])
def test_one_gradient_alone(needed, reduction):
    inputs, targets = make((9,), 4, 6, torch.float64)
    inputs[needed].requires_grad_()
    mk.linear_cross_entropy(**inputs, targets=targets, reduction=reduction).sum().backward()
    ours, inputs[needed].grad = inputs[needed].grad, None
    linear_cross_entropy_reference(**inputs, targets=targets, reduction=reduction).sum().backward()
    torch.testing.assert_close(ours, inputs[needed].grad)
    other = inputs["weight" if needed == "x" else "x"]
    assert other.grad is None


def test_without_gradients_none_are_made():
    inputs, targets = make((9,), 4, 6)
    for value in inputs.values():
        value.requires_grad_()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        loss = mk.linear_cross_entropy(**inputs, targets=targets)
    assert not any("scatter_add" in name or "addmm" in name for name in made), made
    torch.testing.assert_close(loss, linear_cross_entropy_reference(**inputs, targets=targets).detach())


def test_upstream_gradient_scales_in_fp32():
    """1/3 in bf16 is off by 0.1 %; the gradients may only have their own rounding."""
    inputs, targets = make((5,), 6, 8, torch.bfloat16)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    mk.linear_cross_entropy(**leaves, targets=targets, reduction="sum").backward()
    whole = leaves["x"].grad
    leaves["x"].grad = None
    (mk.linear_cross_entropy(**leaves, targets=targets, reduction="sum") * (1 / 3)).backward()
    assert torch.equal(leaves["x"].grad, (whole.float() * torch.tensor(1 / 3)).bfloat16())


def test_fp16_neither_underflows_nor_overflows():
    """8000 rows of x = 64 with one target: dweight of the sum is about 256000 x 1, beyond fp16, the mean's is not; the
    entries of dlogits are 1/2, which 1/8000 of the loss scale would take below fp16's normal numbers."""
    x = torch.full((8000, 2), 64.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(2, 2, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(8000, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.CHUNK_BYTES, "cpu", 64 << 20)
        mk.linear_cross_entropy(x, weight, targets).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-32.0, -32.0], [32.0, 32.0]]).half(), rtol=1e-3, atol=0)


def test_never_holds_all_the_logits():
    """No tensor of more elements than a chunk, x or weight is made, though the logits would have 60 times more."""
    (inputs, targets), largest = make((4000,), 4, 64), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    for reduction in ("mean", "none"):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        with Watch():
            loss = mk.linear_cross_entropy(**leaves, targets=targets, reduction=reduction)
            loss.sum().backward()
    assert largest[0] <= 4000 * 4


def test_padding_rows_of_weight_do_not_count_whatever_they_hold():
    inputs, targets = make((6,), 4, 8, vocab_size=5)
    inputs["weight"][5:] = float("nan")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    for reduction in ("mean", "none"):
        leaves["x"].grad = leaves["weight"].grad = None
        mk.linear_cross_entropy(**leaves, targets=targets, vocab_size=5, reduction=reduction, **ALL).sum().backward()
        x, cut = leaves["x"].detach().requires_grad_(), leaves["weight"].detach()[:5].requires_grad_()
        linear_cross_entropy_reference(x, cut, targets, reduction=reduction, **ALL).sum().backward()
        torch.testing.assert_close(leaves["x"].grad, x.grad)
        torch.testing.assert_close(leaves["weight"].grad, torch.nn.functional.pad(cut.grad, (0, 0, 0, 3)))


def test_nothing_counted_is_nan_with_zero_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    loss = mk.linear_cross_entropy(x, torch.randn(5, 4), torch.full((3,), -100), reduction="sum")
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros(3, 4))
    assert mk.linear_cross_entropy(x, torch.randn(5, 4), torch.full((3,), -100)).isnan()


def test_reference_passes_gradcheck():
    inputs, targets = make((5,), 3, 4, torch.float64, vocab_size=3)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy_reference(x, w, targets, vocab_size=3, **ALL),
        [value.requires_grad_() for value in inputs.values()],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs, targets = make((2, 3), 4, 7, dtype, vocab_size=6)
    x, weight = (value.requires_grad_() for value in inputs.values())
    options = (-100, 0.1, 0.01, 6, "", "torch")
    library.opcheck(torch.ops.megakern.linear_cross_entropy_sum.default, (x, weight, targets, True, True, *options))
    library.opcheck(torch.ops.megakern.linear_cross_entropy_rows.default, (x, weight, targets, *options))
    x, weight = x.detach(), weight.detach()
    lse = (x @ weight[:6].t()).float().logsumexp(-1)
    library.opcheck(
        torch.ops.megakern.linear_cross_entropy_rows_backward.default,
        (torch.ones(2, 3), x, weight, targets, lse, True, False, *options),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction):
    inputs, targets = make((5,), 4, 9)

    def loss(x, weight):
        return mk.linear_cross_entropy(x * 2, weight, targets, reduction=reduction, **ALL)

    assert_gradients_close(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, inputs)


def test_repeats_are_bit_identical():
    inputs, targets = make((64,), 16, 33)
    first, second = (mk.linear_cross_entropy(**inputs, targets=targets) for _ in range(2))
    assert torch.equal(first, second)


def run_parallel(V, vocab_size, options, dtype) -> tuple:
    kernel.CHUNK_BYTES["cpu"] = 128
    group = dist.group.WORLD
    inputs, targets = make((3, 5), 6, V, dtype, vocab_size=vocab_size)
    x = inputs["x"].clone().requires_grad_()
    weight = inputs["weight"].chunk(group.size())[group.rank()].clone().requires_grad_()
    loss = mk.linear_cross_entropy(
        copy_to_tensor_parallel(x, group), weight, targets, group=group, vocab_size=vocab_size, **options
    )
    (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
    kernel.CHUNK_BYTES["cpu"] = 64 << 20
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "V, vocab_size, options",
    [(16, None, {}), (16, 15, {**ALL, "reduction": "none"}), (16, 3, {**ALL, "reduction": "sum"})],
)
def test_vocabulary_parallel(ranks, size, V, vocab_size, options, dtype):
    results = ranks.run(run_parallel, size, V, vocab_size, options, dtype)
    inputs, targets = make((3, 5), 6, V, dtype, vocab_size=vocab_size)
    wanted = {}
    for precision in (torch.float64, dtype):
        x, weight = (value.detach().to(precision).requires_grad_() for value in inputs.values())
        loss = linear_cross_entropy_reference(x, weight, targets, vocab_size=vocab_size, **options)
        (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
        wanted[precision] = (loss.detach(), x.grad, weight.grad)
    for loss, dx, _ in results:
        assert_close_to_ref(loss, wanted[torch.float64][0], wanted[dtype][0], name="loss")
        assert_close_to_ref(dx, wanted[torch.float64][1], wanted[dtype][1], name="dx")
        assert torch.equal(loss, results[0][0]) and torch.equal(dx, results[0][1])
    dweight = torch.cat([result[2] for result in results])
    assert_close_to_ref(dweight, wanted[torch.float64][2], wanted[dtype][2], name="dweight")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"targets": torch.tensor([0, 4])}, IndexError, r"linear_cross_entropy: targets must be in \[0, 4\)"),
        ({"targets": torch.tensor([0, 4]), "reduction": "none"}, IndexError, r"targets must be in \[0, 4\) .* row 1"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must have shape .* = \(2,\), got \(1,\)"),
        ({"targets": torch.tensor([0, 1]).int()}, TypeError, "linear_cross_entropy: targets must be int64"),
        ({"targets": torch.tensor([0, 1], device="meta")}, ValueError, "targets must be on the device of x"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must have shape \(\.\.\., K\) with K = 3 .* got \(2, 5\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \(V, K\) with V, K > 0, got \(3,\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight must have shape \(V, K\) with V, K > 0"),
        ({"weight": torch.zeros(4, 3).half()}, TypeError, "weight must be float32 or have the dtype of x"),
        ({"vocab_size": 5}, ValueError, "linear_cross_entropy: vocab_size must be from 1 to the 4 columns"),
        ({"label_smoothing": -0.1}, ValueError, r"linear_cross_entropy: label_smoothing must be in \[0, 1\]"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message):
        mk.linear_cross_entropy(**arguments)
