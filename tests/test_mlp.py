"""linear_swiglu, and two linear layers whose gradients meet before the activation between them. No device needed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library
from torch.nn import functional as F

import megakern as mk
from megakern.layers.lora import add_adapters
from megakern.ops import mlp
from megakern.ops.activation import KINDS, activation_reference
from megakern.ops.mlp import Activated, activation_gradient, linear_activated, linear_after, linear_swiglu_reference
from tests.closeness import assert_gradients_close

# (leading shape of x, K, N): smallest, one row, primes, a tile and its neighbours, no rows, a vector.
SHAPES = [((1,), 1, 8), ((1,), 64, 24), ((2, 3), 17, 31), ((129,), 33, 65), ((0,), 8, 4), ((), 6, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BEFORE = [*KINDS, "swiglu"]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


def make(lead, K, N, dtype, *, gated=True, bias=True, bias_dtype=None):
    g = torch.Generator().manual_seed(0)

    def draw(*s):
        return torch.randn(*s, generator=g).to(dtype)

    inputs = {"x": draw(*lead, K)}
    for name in ("gate", "up") if gated else ("gate",):
        inputs[f"{name}_weight"] = draw(N, K) / K**0.5
        if bias:
            inputs[f"{name}_bias"] = draw(N).to(bias_dtype or dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead, K, N", SHAPES)
def test_swiglu_output_and_gradients(lead, K, N, dtype):
    assert_gradients_close(mk.linear_swiglu, linear_swiglu_reference, make(lead, K, N, dtype, bias=False))
    assert_gradients_close(mk.linear_swiglu, linear_swiglu_reference, make(lead, K, N, dtype))


def test_fp32_parameters_of_a_narrower_x():
    inputs = make((3, 5), 16, 24, torch.bfloat16, bias_dtype=torch.float32)
    inputs |= {name: value.float() for name, value in inputs.items() if "weight" in name}
    assert_gradients_close(mk.linear_swiglu, linear_swiglu_reference, inputs, floor=8e-3)


def pair(x, after, after_bias, residual, kind="swiglu", **first):
    """linear_after of linear_activated."""
    names = [name for name in ("gate", "up") if f"{name}_weight" in first]
    parameters = [(first[f"{name}_weight"], first.get(f"{name}_bias")) for name in names]
    return linear_after(linear_activated(x, parameters, kind), after, after_bias, residual)


def pair_reference(x, after, after_bias, residual, kind="swiglu", **first):
    first = {name: value.to(x.dtype) for name, value in first.items()}
    if kind == "swiglu":
        inner = linear_swiglu_reference(x, **first)
    else:
        inner = activation_reference(F.linear(x, first["gate_weight"], first.get("gate_bias")), kind)
    return F.linear(inner, after.to(x.dtype), after_bias.to(x.dtype)) + residual


def make_pair(kind, dtype, lead=(2, 7), K=12, N=20, C=9, **more):
    g = torch.Generator().manual_seed(1)
    inputs = make(lead, K, N, dtype, gated=kind == "swiglu", **more)
    inputs["after"] = (torch.randn(C, N, generator=g) / N**0.5).to(dtype)
    inputs["after_bias"] = torch.randn(C, generator=g).to(dtype)
    inputs["residual"] = torch.randn(*lead, C, generator=g).to(dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BEFORE)
def test_two_layers_around_an_activation(kind, dtype):
    inputs = make_pair(kind, dtype)
    assert_gradients_close(partial(pair, kind=kind), partial(pair_reference, kind=kind), inputs)


@pytest.mark.parametrize("needed", ["x", "gate_weight", "up_bias", "after", "after_bias", "residual"])
def test_only_the_needed_gradients_are_made(needed, monkeypatch):
    called = []
    for name in ("input_gradient", "parameter_gradients", "activation_gradient"):
        original = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda *a, n=name, f=original: called.append(n) or f(*a))
    inputs = {name: value.requires_grad_(name == needed) for name, value in make_pair("swiglu", torch.float64).items()}
    pair(**inputs).sum().backward()
    assert [name for name, value in inputs.items() if value.grad is not None] == [needed]
    assert called.count("input_gradient") == (2 if needed == "x" else 0)
    assert ("activation_gradient" in called) == (needed not in ("after", "after_bias", "residual"))


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    inputs = make_pair("gelu", torch.float32)
    plain = pair(**inputs, kind="gelu")
    parameters = [(inputs["gate_weight"], inputs["gate_bias"])]
    assert linear_activated(inputs["x"], parameters, "gelu").pre is None
    inputs["x"].requires_grad_()
    kept = linear_activated(inputs["x"], parameters, "gelu")
    assert kept.pre.requires_grad and not kept.value.requires_grad
    assert torch.equal(plain, pair(**inputs, kind="gelu"))
    with torch.no_grad():
        assert torch.equal(plain, pair(**inputs, kind="gelu"))


@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu"])
def test_opcheck(kind):
    inputs = {name: value.requires_grad_() for name, value in make_pair(kind, torch.float32).items()}
    x, gate, gate_bias = inputs["x"], inputs["gate_weight"], inputs["gate_bias"]
    ops = torch.ops.megakern
    if kind == "swiglu":
        up, up_bias = inputs["up_weight"], inputs["up_bias"]
        for keep in (True, False):
            values = [value if keep else value.detach() for value in (x, gate, up, gate_bias, up_bias)]
            library.opcheck(ops.linear_swiglu.default, (*values, keep, "torch"))
        library.opcheck(ops.linear_swiglu_open.default, (x, gate, up, gate_bias, up_bias, True, "torch"))
    else:
        library.opcheck(ops.linear_activated.default, (x, gate, gate_bias, kind, "torch"))
    value, pre = torch.randn(2, 2, 7, 20)
    second = torch.randn(2, 7, 20).requires_grad_() if kind == "swiglu" else None
    after = (inputs["after"], inputs["after_bias"], inputs["residual"])
    library.opcheck(ops.linear_after.default, (value, pre.requires_grad_(), second, *after, kind, "torch"))
    arguments = (
        torch.randn(2, 7, 9),
        inputs["after"].detach(),
        pre.detach(),
        None if second is None else second.detach(),
        kind,
        "torch",
    )
    library.opcheck(activation_gradient, arguments)


@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu"])
def test_layers_compile_in_one_graph_and_recompute(kind):
    layer = mk.ParallelMLP(12, 20, activation=kind)
    x = torch.randn(2, 5, 12)

    def gradients(function):
        given = x.clone().requires_grad_()
        y = function(given)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])

    plain = gradients(layer)
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    again = gradients(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    for one, *others in zip(plain, compiled, again, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu"])
def test_the_layer_has_no_pass_over_the_inner_gradient(kind, monkeypatch):
    """The derivative belongs to the product of fc2's input gradient; with an adapter the plain ops do the same."""
    asked = []
    original = mlp._activation_gradient
    monkeypatch.setattr("megakern.ops.mlp.activation_gradient", lambda *a: asked.append(a[4]) or original(*a))
    layer = mk.ParallelMLP(12, 20, activation=kind, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    results = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        y = layer(given)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [given])))
        assert asked == [kind]
        add_adapters(layer, mk.ParallelContext(), rank=2, alpha=1.0, targets=["fc"])
        for name, parameter in layer.named_parameters():
            if "adapter" in name:
                torch.nn.init.zeros_(parameter) if name.endswith("b") else torch.nn.init.normal_(parameter)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 5)}, ValueError, r"x must have shape \(\.\.\., K\) with K = 4 of gate_weight .*\(3, 5\)"),
        ({"gate_weight": torch.ones(4)}, ValueError, r"gate_weight must have shape \(N, K\) with N, K > 0, got \(4,\)"),
        ({"up_weight": torch.ones(3, 4)}, ValueError, r"up_weight must have shape \(N, K\) of gate_weight = \(2, 4\)"),
        ({"up_weight": torch.ones(2, 4).half()}, TypeError, "up_weight must be float32 or have the dtype of x"),
        ({"up_bias": torch.ones(3)}, ValueError, r"up_bias must have shape \(N,\) = \(2,\), got \(3,\)"),
        ({"gate_bias": torch.ones(2, device="meta")}, ValueError, "gate_bias must be on the device of x"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16, bfloat16, float32 or float64"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"x": torch.ones(3, 4), "gate_weight": torch.ones(2, 4), "up_weight": torch.ones(2, 4), **change}
    with pytest.raises(error, match=f"linear_swiglu: {message}"):
        mk.linear_swiglu(**arguments)


def test_what_was_handed_on_must_fit_its_activation():
    x = torch.ones(3, 4, requires_grad=True)
    for kind, up in (("gelu", x), ("swiglu", None), ("relu", None)):
        with pytest.raises(ValueError, match="linear_after: up goes with activation 'swiglu' and no other"):
            linear_after(Activated(x.detach(), x, up, kind), torch.ones(2, 4))


def test_reference_passes_gradcheck():
    inputs = [value.requires_grad_() for value in make((3,), 4, 5, torch.float64).values()]
    x, gate, gate_bias, up, up_bias = inputs
    torch.autograd.gradcheck(linear_swiglu_reference, (x, gate, up, gate_bias, up_bias))
