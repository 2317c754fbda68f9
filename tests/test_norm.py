"""layer_norm and rms_norm. No device needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library

import megakern as mk
from megakern.ops.norm import layer_norm_reference, norm_of_stream, rms_norm_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close

# Smallest, one row, primes, a power of two and its neighbours, empty batch. C = 1 has gradient 0 by cancellation: there
# is nothing but rounding noise to compare, and C = 2 (y is +-1) nearly so: the smallest is C = 3.
SHAPES = [(1, 3), (1, 768), (7, 13), (3, 5, 127), (2, 128), (2, 129), (0, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels")


def make(shape, dtype, *, bias, residual, seed=0, weight_dtype=None):
    g = torch.Generator().manual_seed(seed)
    C = shape[-1]

    def draw(*s):
        return torch.randn(*s, generator=g).to(dtype)

    inputs = {"x": draw(*shape) * 2 + 1, "weight": (draw(C) + 1).to(weight_dtype or dtype)}
    if bias:
        inputs["bias"] = draw(C).to(weight_dtype or dtype)
    if residual:
        inputs["residual"] = draw(*shape)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_and_gradients(shape, dtype, residual):
    inputs = make(shape, dtype, bias=True, residual=residual)
    assert_gradients_close(mk.layer_norm, layer_norm_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_and_gradients(shape, dtype, residual):
    inputs = make(shape, dtype, bias=False, residual=residual)
    assert_gradients_close(mk.rms_norm, rms_norm_reference, inputs)


@pytest.mark.parametrize("op, reference", [(mk.layer_norm, layer_norm_reference), (mk.rms_norm, rms_norm_reference)])
def test_fp32_weights_with_bf16_input_and_strided_input(op, reference):
    inputs = make((6, 34), torch.bfloat16, bias=False, residual=True, weight_dtype=torch.float32)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["residual"] = inputs["residual"].expand(6, 34)
    assert_gradients_close(op, reference, inputs)


def test_layer_norm_without_bias_matches_torch():
    inputs = make((4, 33), torch.float32, bias=False, residual=False)
    expected = torch.nn.functional.layer_norm(inputs["x"].double(), (33,), inputs["weight"].double())
    torch.testing.assert_close(mk.layer_norm(**inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_when_only_the_residual_stream_is_used():
    inputs = make((4, 16), torch.float32, bias=False, residual=True)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    mk.rms_norm(**leaves)[1].sum().backward()
    torch.testing.assert_close(leaves["x"].grad, torch.ones(4, 16))
    torch.testing.assert_close(leaves["residual"].grad, torch.ones(4, 16))


def test_references_pass_gradcheck():
    inputs = [v.requires_grad_() for v in make((3, 5), torch.float64, bias=True, residual=True).values()]
    torch.autograd.gradcheck(lambda x, w, b, r: layer_norm_reference(x, w, b, residual=r), inputs)
    torch.autograd.gradcheck(lambda x, w, _b, r: rms_norm_reference(x, w, residual=r), inputs)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(centre, residual):
    v = make((3, 5, 7), torch.float32, bias=centre, residual=residual)
    v = {name: value.requires_grad_() for name, value in v.items()}
    arguments = (v["x"], v["weight"], v.get("bias"), v.get("residual"), 1e-5, centre, "torch")
    library.opcheck(torch.ops.megakern.norm.default, arguments)


def test_compiles_in_one_graph():
    v = make((3, 16), torch.float32, bias=True, residual=True)

    def both(x, weight, bias, residual):
        y, h = mk.layer_norm(x, weight, bias, residual=residual)
        return mk.rms_norm(y + h, weight)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, both, v)


def test_repeats_are_bit_identical():
    v = make((64, 65), torch.bfloat16, bias=True, residual=True)
    first, second = mk.layer_norm(**v), mk.layer_norm(**v)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(C,\) = \(4,\), got \(5,\)"),
        ({"bias": torch.ones(4, 1)}, ValueError, r"bias must have shape \(C,\) = \(4,\), got \(4, 1\)"),
        ({"residual": torch.ones(2, 4)}, ValueError, r"residual must have shape of x = \(3, 4\), got \(2, 4\)"),
        ({"residual": torch.ones(3, 4).half()}, TypeError, "residual must have the dtype of x"),
        ({"weight": torch.ones(4).double()}, TypeError, "weight must be float32 or have the dtype of x"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16, bfloat16, float32 or float64"),
        ({"x": np.ones((3, 4))}, TypeError, "x must be float16, .*, got a numpy.ndarray; make a tensor of it"),
        ({"weight": None}, ValueError, r"weight must have shape \(C,\) = \(4,\), got None; pass one weight"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x must have shape \(\.\.\., C\) with C > 0"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=message):
        mk.layer_norm(**arguments)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("reads", ["both", "norm", "stream"])
def test_norm_of_the_residual_stream(centre, reads):
    """Gradients where the norm and what follows read one x, against float64; either may go unread."""
    shape = (2, 7, 48)
    generator = torch.Generator().manual_seed(0)
    x, dy, dstream = (torch.randn(shape, generator=generator) for _ in range(3))
    weight, bias = torch.randn(2, 48, generator=generator)
    bias = bias if centre else None

    def gradients(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        parameters = [p.to(dtype, copy=True).requires_grad_() for p in (weight, bias) if p is not None]
        y, stream = function(leaf, *parameters)
        parts = {"norm": (y * dy.to(dtype)).sum(), "stream": (stream * dstream.to(dtype)).sum()}
        chosen = list(parts.values()) if reads == "both" else [parts[reads]]
        return y.detach(), *torch.autograd.grad(sum(chosen), [leaf, *parameters], allow_unused=reads == "stream")

    def two_reads(x, *parameters):
        return (layer_norm_reference if centre else rms_norm_reference)(x, *parameters, eps=1e-5), x

    ours = gradients(lambda x, *parameters: norm_of_stream(x, *parameters, centre=centre), torch.float32)
    for values in zip(ours, gradients(two_reads, torch.float64), gradients(two_reads, torch.float32), strict=True):
        if values[1] is None:
            assert values[0] is None
        else:
            assert_close_to_ref(*values)
