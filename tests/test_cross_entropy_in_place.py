"""cross_entropy(in_place=True): the gradient over the logits, what it costs, and every wrong use of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import library

import megakern as mk
from megakern.ops.cross_entropy import cross_entropy_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.test_cross_entropy import DTYPES, make

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


def in_place(targets, **options):
    """The loss of a copy of `logits`, so that gradients can be asked of `logits`."""
    return lambda logits: mk.cross_entropy(logits * 1, targets, in_place=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape, V", [((1,), 1), ((7,), 13), ((3, 5), 127), ((), 5)])
def test_loss_and_gradient(shape, V, reduction, dtype):
    """The upstream gradient that the comparison draws is not 1: the gradient is scaled in backward."""
    logits, targets = make(shape, V, dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2}
    reference = lambda logits: cross_entropy_reference(logits, targets, **options)  # noqa: E731
    assert_gradients_close(in_place(targets, **options), reference, {"logits": logits})


def test_the_gradient_is_in_the_memory_of_the_logits():
    leaf, targets = make((6,), 9)
    logits = leaf.requires_grad_() * 1
    addresses = []
    logits.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    loss = mk.cross_entropy(logits, targets, in_place=True)
    expected = torch.autograd.grad(cross_entropy_reference(leaf, targets), leaf)[0]
    torch.testing.assert_close(logits.detach(), expected)
    loss.backward()
    assert addresses == [logits.data_ptr()]
    torch.testing.assert_close(leaf.grad, expected)


def test_logits_that_are_a_view():
    leaf, targets = make((2, 3), 9)
    loss = mk.cross_entropy((leaf.requires_grad_() * 1).view(6, 9), targets.view(6), in_place=True)
    (expected,) = torch.autograd.grad(cross_entropy_reference(leaf, targets), leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected)


def test_nothing_counted_is_nan_with_zero_gradient():
    leaf = torch.randn(3, 4, requires_grad=True)
    loss = mk.cross_entropy(leaf * 1, torch.full((3,), -100), in_place=True)
    loss.backward()
    assert loss.isnan() and torch.equal(leaf.grad, torch.zeros(3, 4))


def test_without_a_gradient_the_logits_stay():
    logits, targets = make((5,), 7)
    before = logits.clone()
    expected = mk.cross_entropy(logits, targets)
    assert torch.equal(mk.cross_entropy(logits, targets, in_place=True), expected)
    with torch.no_grad():
        assert torch.equal(mk.cross_entropy(logits.requires_grad_() * 1, targets, in_place=True), expected)
    assert torch.equal(logits, before)


def test_a_second_backward_pass_and_a_second_derivative_are_errors():
    leaf, targets = make((5,), 7)
    loss = mk.cross_entropy(leaf.requires_grad_() * 1, targets, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward pass through in_place=True, .* use in_place=False"):
        loss.backward()
    loss = mk.cross_entropy(leaf * 1, targets, in_place=True)
    with pytest.raises(RuntimeError, match="in_place=True has no second derivative; use in_place=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_backward_pass_that_needs_the_logits_is_an_error():
    leaf, targets = make((5,), 7)
    logits = leaf.requires_grad_() * 1
    other = logits.square().mean()
    loss = mk.cross_entropy(logits, targets, in_place=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_function_ignores_it():
    leaf, targets = make((5,), 9)
    compiled = torch.compile(in_place(targets), fullgraph=True, backend="aot_eager")
    reference = lambda logits: cross_entropy_reference(logits, targets)  # noqa: E731
    assert_gradients_close(compiled, reference, {"logits": leaf})


def test_opcheck():
    """But for autograd: the ops are called by a function that has its own."""
    logits, targets = make((2, 3), 7)
    options = (-100, 0.1, 0.01, 7, "", "torch")
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.megakern.cross_entropy_in_place.default
    library.opcheck(op, (logits, torch.tensor(0.5), targets, *options), test_utils=tests)
    library.opcheck(op, (logits, None, targets, *options), test_utils=tests)
    scale = torch.ops.megakern.cross_entropy_scale.default
    library.opcheck(scale, (logits, torch.tensor(0.5), "torch"), test_utils=tests)


def on_a_rank(leaf, targets, options):
    group = dist.group.WORLD
    own = leaf.chunk(group.size(), -1)[group.rank()].clone().requires_grad_()
    loss = mk.cross_entropy(own * 1, targets, group=group, in_place=True, **options)
    loss.backward()
    return loss.detach(), own.grad


def test_vocabulary_parallel(ranks):
    options = {"vocab_size": 13, "label_smoothing": 0.1}
    leaf, targets = make((7,), 16, vocab_size=13)
    results = ranks.run(on_a_rank, 2, leaf, targets, options)
    wide = leaf.double().requires_grad_()
    expected = cross_entropy_reference(wide, targets, **options)
    (gradient,) = torch.autograd.grad(expected, wide)
    for loss, _ in results:
        assert_close_to_ref(loss, expected.detach(), expected.detach().float())
    assert_close_to_ref(torch.cat([own for _, own in results], -1), gradient, gradient.float())


@pytest.mark.parametrize(
    "logits, options, message",
    [
        (torch.zeros(2, 4), {"reduction": "none"}, 'in_place needs reduction "mean" or "sum", got "none"'),
        (torch.zeros(2, 4, requires_grad=True), {}, "must not be a leaf that needs a gradient"),
        (torch.zeros(4, 2).t(), {}, r"must be contiguous, got strides \(1, 2\)"),
    ],
)
def test_wrong_input_is_named(logits, options, message):
    with pytest.raises(ValueError, match=f"cross_entropy: in_place .*{message}|{message}"):
        mk.cross_entropy(logits, torch.tensor([0, 1]), in_place=True, **options)
