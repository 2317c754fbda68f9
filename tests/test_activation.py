"""gelu and swiglu. No device needed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.torch.activation import activation_backward, activation_forward
from megakern.ops.activation import KINDS, activation_reference, gelu_reference, swiglu_reference
from tests.closeness import assert_gradients_close

SHAPES = [(1,), (1, 768), (7, 13), (3, 5, 127), (0, 16), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


def draw(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_gradient(shape, dtype, approximate):
    def ours(x):
        return mk.gelu(x, approximate=approximate)

    assert_gradients_close(ours, lambda x: gelu_reference(x, approximate=approximate), {"x": draw(*shape, dtype=dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_gradients(shape, dtype):
    inputs = {"gate": draw(*shape, dtype=dtype), "up": draw(*shape, dtype=dtype, seed=1)}
    assert_gradients_close(mk.swiglu, swiglu_reference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_the_halves_of_one_tensor(dtype):
    def halves(op):
        return lambda both: op(*both.chunk(2, -1))

    assert_gradients_close(halves(mk.swiglu), halves(swiglu_reference), {"both": draw(2, 5, 34, dtype=dtype)})


def test_values_from_the_formulas():
    """Independent of ATen: written with the math module."""
    values = [-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0]
    formulas = {
        "gelu": lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)),
        "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu_squared": lambda v: max(v, 0.0) ** 2,
        "silu": lambda v: v / (1 + math.exp(-v)),
    }
    assert set(formulas) == set(KINDS)
    x = torch.tensor(values, dtype=torch.float64)
    for kind, formula in formulas.items():
        expected = torch.tensor([formula(v) for v in values], dtype=torch.float64)
        torch.testing.assert_close(activation_forward(x, kind), expected, rtol=1e-12, atol=1e-12)
        slope = torch.tensor([(formula(v + 1e-6) - formula(v - 1e-6)) / 2e-6 for v in values], dtype=torch.float64)
        torch.testing.assert_close(activation_backward(torch.ones_like(x), x, kind), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_launchers_take_strided_input_and_keep_nan(kind):
    x = draw(6, 4).t()
    dy = draw(1, 1).expand(4, 6)
    leaf = x.clone().requires_grad_()
    y = activation_reference(leaf, kind)
    y.backward(dy)
    for ours, expected in ((activation_forward(x, kind), y), (activation_backward(dy, x, kind), leaf.grad)):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, expected)
    assert activation_forward(torch.tensor([math.nan]), kind).isnan().all()
    assert activation_backward(torch.ones(1), torch.tensor([math.nan]), kind).isnan().all()


def test_references_pass_gradcheck():
    x = draw(4, 3).double().requires_grad_()
    for kind in KINDS:
        torch.autograd.gradcheck(lambda v, kind=kind: activation_reference(v, kind), x)
    torch.autograd.gradcheck(swiglu_reference, (x, draw(4, 3, seed=1).double().requires_grad_()))


def test_opcheck():
    gate, up = draw(3, 14).chunk(2, -1)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    for kind in KINDS:
        library.opcheck(torch.ops.megakern.activation.default, (gate, kind, "torch"))
        library.opcheck(torch.ops.megakern.activation_backward.default, (up.detach(), gate.detach(), kind, "torch"))
    library.opcheck(torch.ops.megakern.swiglu.default, (gate, up, "torch"))
    detached = (draw(3, 7), gate.detach(), up.detach(), "torch")
    library.opcheck(torch.ops.megakern.swiglu_backward.default, detached)


def test_compiles_in_one_graph_and_repeats():
    def both(gate, up):
        return mk.swiglu(gate, mk.gelu(up, approximate="tanh"))

    v = {"gate": draw(3, 16), "up": draw(3, 16, seed=1)}
    assert_gradients_close(torch.compile(both, fullgraph=True, backend="aot_eager"), both, v)
    assert torch.equal(both(**v), both(**v))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        mk.gelu(torch.ones(2), approximate="erf")
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64"):
        mk.gelu(torch.ones(2).int())
    with pytest.raises(ValueError, match=r"up must have shape of gate = \(2,\), got \(3,\)"):
        mk.swiglu(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="up must have the dtype of gate"):
        mk.swiglu(torch.ones(2), torch.ones(2).half())
    with pytest.raises(ValueError, match="backend 'triton' was asked for"):
        mk.swiglu(torch.ones(2), torch.ones(2), backend="triton")
    with pytest.raises(ValueError, match="backend 'cuda' was asked for"):
        mk.gelu(torch.ones(2), backend="cuda")
