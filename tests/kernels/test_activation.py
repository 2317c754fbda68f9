"""The activations of every compiled backend against float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import library

import megakern as mk
from megakern.ops.activation import KINDS, activation_reference, gelu_reference, swiglu_reference
from megakern.ops.dispatch import launcher
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

OP = "gelu"
SHAPES = [(1,), (7, 13), (3, 5, 127), (1023,), (1025,), (0, 16), ()]


def launchers(backend):
    """-> forward(x, kind), backward(dy, x, kind)"""
    return tuple(launcher(backend, "activation", f"activation_{way}") for way in ("forward", "backward"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_launchers(kind, shape, dtype, device, backend):
    forward, backward = launchers(backend)
    x, dy = draw(*shape, dtype=dtype, device=device, scale=3.0), draw(*shape, dtype=dtype, device=device, seed=1)
    found = forward(x, kind), backward(dy, x, kind)
    expected = []
    for wide in (torch.float64, dtype):
        leaf = x.to(wide).clone().requires_grad_()
        y = activation_reference(leaf, kind)
        expected.append((y.detach(), torch.autograd.grad(y, leaf, dy.to(wide))[0]))
    for ours, reference, same in zip(found, *expected, strict=True):
        assert ours.is_contiguous()
        assert_close_to_ref(ours, reference, same)


def test_far_values_from_the_formulas(device, backend):
    """Independent of ATen, where 1 + tanh and 1 + erf cancel or overflow."""
    values = [-80.0, -8.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 80.0]
    formulas = {
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: v / (1 + math.exp(min(700, -2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))),
        "relu_squared": lambda v: max(v, 0.0) ** 2,
        "silu": lambda v: v / (1 + math.exp(-v)),
    }
    x = torch.tensor(values, device=device)
    forward, backward = launchers(backend)
    for kind in KINDS:
        expected = torch.tensor([formulas[kind](v) for v in values], device=device)
        torch.testing.assert_close(forward(x, kind), expected, rtol=1e-5, atol=1e-6)
        slopes = [(formulas[kind](v + 1e-6) - formulas[kind](v - 1e-6)) / 2e-6 for v in values]
        found = backward(torch.ones_like(x), x, kind)
        torch.testing.assert_close(found, torch.tensor(slopes, device=device), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_and_comes_from_nowhere_else(kind, device, backend):
    forward, backward = launchers(backend)
    x = draw(5, 17, device=device)
    assert torch.equal(forward(fenced(x), kind), forward(x, kind))
    assert torch.equal(backward(fenced(x), fenced(x), kind), backward(x, x, kind))
    nan = torch.full((3,), math.nan, device=device)
    assert forward(nan, kind).isnan().all()
    assert backward(torch.ones_like(nan), nan, kind).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (2, 3, 1025), (0, 4)])
def test_swiglu(shape, dtype, device, backend):
    inputs = {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, name in enumerate(("gate", "up"))}
    assert_gradients_close(partial(mk.swiglu, backend=backend), swiglu_reference, inputs)


@pytest.mark.parametrize("F", [17, 1100])
def test_swiglu_of_the_halves_of_one_tensor(F, device, backend):
    def halves(op):
        return lambda both: op(*both.chunk(2, -1))

    both = {"both": draw(2, 5, 2 * F, dtype=torch.bfloat16, device=device)}
    assert_gradients_close(halves(partial(mk.swiglu, backend=backend)), halves(swiglu_reference), both)


def test_transposed_and_expanded_input(device, backend):
    forward, backward = launchers(backend)
    x, dy = draw(6, 4, device=device).t(), draw(1, 1, device=device).expand(4, 6)
    torch.testing.assert_close(forward(x, "silu"), forward(x.contiguous(), "silu"))
    torch.testing.assert_close(backward(dy, x, "silu"), backward(dy.contiguous(), x.contiguous(), "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [64, 67])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_views_with_and_without_room_for_16_byte_accesses(offset, C, dtype, device, backend):
    """Rows that start on any element; the wide accesses of an aligned view must give the bits of the narrow ones."""
    forward, backward = launchers(backend)
    x, dy = (draw(5, C, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    inside = [torch.full((5, 96), math.nan, dtype=dtype, device=device)[:, offset : offset + C] for _ in range(2)]
    for view, values in zip(inside, (x, dy), strict=True):
        view.copy_(values)
    assert torch.equal(forward(inside[0], "silu"), forward(x, "silu"))
    assert torch.equal(backward(inside[1], inside[0], "silu"), backward(dy, x, "silu"))


def test_a_lazily_negated_input(device, backend):
    """`imag` of a conjugate is a view of the other sign: its memory alone would be wrong."""
    x = torch.view_as_complex(draw(5, 2, device=device)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(mk.gelu(x, backend=backend), gelu_reference(x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_compiles_and_passes_opcheck(approximate, device, unguarded, backend):
    x = draw(3, 14, device=device).requires_grad_()
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    library.opcheck(torch.ops.megakern.activation.default, (x, kind, backend))
    library.opcheck(torch.ops.megakern.swiglu.default, (x, x.detach(), backend))
    ours = torch.compile(
        partial(mk.gelu, approximate=approximate, backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert_gradients_close(ours, partial(gelu_reference, approximate=approximate), {"x": x})
