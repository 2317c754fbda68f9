"""linear: product, bias, activation, residual, and their gradients. No device needed."""

from __future__ import annotations

import pytest
import torch
from torch import library

import megakern as mk
from megakern.ops.activation import KINDS
from megakern.ops.linear import accumulate_weight_gradient, input_gradient, linear_reference, weight_gradient
from tests.closeness import assert_close_to_ref, assert_gradients_close, assert_rounded_once

# (leading shape of x, K, N): smallest, one row, primes, a tile and its neighbours, no rows, a vector.
SHAPES = [((1,), 1, 1), ((1,), 64, 3), ((7,), 13, 5), ((2, 3), 17, 31), ((129,), 33, 65), ((0,), 8, 4), ((), 6, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


def make(lead, K, N, dtype, *, bias=True, residual=True, bias_dtype=None):
    g = torch.Generator().manual_seed(0)

    def draw(*s):
        return torch.randn(*s, generator=g).to(dtype)

    inputs = {"x": draw(*lead, K), "weight": draw(N, K) / K**0.5}
    if bias:
        inputs["bias"] = draw(N).to(bias_dtype or dtype)
    if residual:
        inputs["residual"] = draw(*lead, N)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead, K, N", SHAPES)
def test_output_and_gradients(lead, K, N, dtype):
    assert_gradients_close(mk.linear, linear_reference, make(lead, K, N, dtype, bias=False, residual=False))
    assert_gradients_close(mk.linear, linear_reference, make(lead, K, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("bias, residual", [(True, False), (True, True), (False, True)])
def test_activations(activation, bias, residual, dtype):
    inputs = make((3, 11), 16, 24, dtype, bias=bias, residual=residual)
    inputs["weight"] = inputs["weight"] * 3  # reaches both tails of the activation
    assert_gradients_close(
        lambda **v: mk.linear(**v, activation=activation),
        lambda **v: linear_reference(**v, activation=activation),
        inputs,
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_fp32_bias_and_strided_inputs(activation, residual):
    v = make((6, 5), 10, 8, torch.bfloat16, residual=residual, bias_dtype=torch.float32)
    v["x"] = v["x"].transpose(0, 1).contiguous().transpose(0, 1)
    v["weight"] = v["weight"].t().contiguous().t()
    if residual:
        v["residual"] = v["residual"][:1].expand(6, 5, 8)
    assert_gradients_close(
        lambda **v: mk.linear(**v, activation=activation), lambda **v: linear_reference(**v, activation=activation), v
    )


def test_bias_gradient_accumulates_in_fp32():
    """2^14 rows of 1 + 2^-7: a bf16 running sum would stop at 256."""
    dy = torch.full((1 << 14, 2), 1 + 2**-7, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        _, dbias = weight_gradient(dy, dy, None, dtype, "torch")
        assert dbias.dtype == dtype
        torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_gradient_is_added_in_fp32_and_rounded_once(dtype):
    for M, N, K in [(300, 24, 16), (37, 13, 5), (512, 130, 70)]:
        g = torch.Generator().manual_seed(0)
        dy, x, start = (torch.randn(*shape, generator=g).to(dtype) for shape in ((M, N), (M, K), (N, K)))
        start *= M**0.5
        for into in (start.clone(), start.t().contiguous().t()):
            accumulate_weight_gradient(into, dy, x, None, "torch")
            assert_rounded_once(into, start.double() + dy.double().t() @ x.double(), M**0.5)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
def test_only_the_needed_gradient_is_made(needed, monkeypatch):
    v = make((4,), 6, 5, torch.float64)
    v[needed].requires_grad_()
    called = []
    monkeypatch.setattr("megakern.ops.linear.input_gradient", lambda *a: called.append("x") or input_gradient(*a))
    monkeypatch.setattr("megakern.ops.linear.weight_gradient", lambda *a: called.append("w") or weight_gradient(*a))
    mk.linear(**v, activation="silu").square().sum().backward()
    assert called == {"x": ["x"], "weight": ["w"], "bias": ["w"], "residual": []}[needed]
    w = make((4,), 6, 5, torch.float64)
    w[needed].requires_grad_()
    linear_reference(**w, activation="silu").square().sum().backward()
    torch.testing.assert_close(v[needed].grad, w[needed].grad)


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    v = make((4,), 6, 5, torch.float32)
    plain = mk.linear(**v, activation="gelu")
    v["weight"].requires_grad_()
    with_grad = mk.linear(**v, activation="gelu")
    with torch.no_grad():
        without = mk.linear(**v, activation="gelu")
    assert torch.equal(plain, with_grad) and torch.equal(plain, without)
    _, pre = torch.ops.megakern.linear(v["x"], v["weight"], None, None, "gelu", False, "torch")
    assert pre.numel() == 0


def test_inputs_are_not_changed():
    v = make((4,), 6, 5, torch.float32)
    before = {name: value.clone() for name, value in v.items()}
    mk.linear(**v, activation="gelu")
    mk.linear(**v)
    assert all(torch.equal(v[name], before[name]) for name in v)


def test_matches_torch_linear_in_half_precision():
    v = make((64,), 128, 96, torch.bfloat16, residual=False)
    wide = torch.nn.functional.linear(v["x"].double(), v["weight"].double(), v["bias"].double())
    assert_close_to_ref(mk.linear(**v), wide, torch.nn.functional.linear(v["x"], v["weight"], v["bias"]))


@pytest.mark.parametrize("activation", [None, *KINDS])
def test_reference_passes_gradcheck(activation):
    inputs = [v.requires_grad_() for v in make((3,), 4, 5, torch.float64).values()]
    torch.autograd.gradcheck(lambda x, w, b, r: linear_reference(x, w, b, residual=r, activation=activation), inputs)


@pytest.mark.parametrize("activation", ["", "gelu_tanh"])
@pytest.mark.parametrize("extra", [False, True])
def test_opcheck(activation, extra):
    v = make((3, 5), 7, 6, torch.float32, bias=extra, residual=extra)
    v = {name: value.requires_grad_() for name, value in v.items()}
    arguments = (v["x"], v["weight"], v.get("bias"), v.get("residual"), activation, activation != "", "torch")
    library.opcheck(torch.ops.megakern.linear.default, arguments)
    dy = torch.randn(3, 5, 6)
    library.opcheck(input_gradient, (dy, v["weight"].detach(), v["x"].detach() if extra else None, "torch"))
    library.opcheck(weight_gradient, (dy, v["x"].detach(), torch.float32, torch.float32 if extra else None, "torch"))
    added = (torch.zeros(6, 7), dy, v["x"].detach(), torch.float32 if extra else None, "torch")
    library.opcheck(accumulate_weight_gradient, added)


def test_compiles_in_one_graph():
    def two(x, weight, bias, residual):
        return mk.linear(mk.linear(x, weight, bias, activation="gelu", residual=residual), weight.t())

    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, two, make((3,), 8, 12, torch.float32))


def test_repeats_are_bit_identical():
    v = make((64,), 65, 33, torch.bfloat16)
    assert torch.equal(mk.linear(**v, activation="gelu"), mk.linear(**v, activation="gelu"))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 5)}, ValueError, r"x must have shape \(\.\.\., K\) with K = 4 .*got \(3, 5\)"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \(\.\.\., K\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(N, K\) with N, K > 0, got \(4,\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"weight must have shape \(N, K\) with N, K > 0"),
        ({"weight": torch.ones(2, 4).half()}, TypeError, "weight must be float32 or have the dtype of x"),
        ({"weight": torch.ones(2, 4, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(N,\) = \(2,\), got \(3,\)"),
        ({"bias": torch.ones(2).half()}, TypeError, "bias must be float32 or have the dtype of x"),
        ({"residual": torch.ones(2)}, ValueError, r"residual must have shape \(\.\.\., N\) of the output = \(3, 2\)"),
        ({"residual": torch.ones(3, 2).half()}, TypeError, "residual must have the dtype of x"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16, bfloat16, float32 or float64"),
        ({"activation": "relu"}, ValueError, "activation must be None or one of gelu, gelu_tanh.* got 'relu'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(2, 4), **change}
    with pytest.raises(error, match=message):
        mk.linear(**arguments)
