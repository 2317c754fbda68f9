"""The Triton norms against float64, over awkward shapes. Runs in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megakern as mk
from megakern.kernels.triton import configs
from megakern.ops.norm import layer_norm_reference, rms_norm_reference
from tests.closeness import assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

pytestmark = pytest.mark.only("triton")

NORMS = {
    "layer": (partial(mk.layer_norm, backend="triton"), layer_norm_reference),
    "rms": (partial(mk.rms_norm, backend="triton"), rms_norm_reference),
}
CASES = [("layer", False), ("rms", True)]  # test_every_configuration has the other two
# One row, primes, the narrowest tile and its neighbours, several tiles of rows, empty.
SHAPES = [(1, 3), (7, 13), (3, 5, 127), (2, 128), (2, 129), (40, 130), (0, 16)]


def make(shape, dtype, device, *, norm, residual, weight_dtype=None):
    C, given = shape[-1], {"dtype": dtype, "device": device}
    weights = {"dtype": weight_dtype or dtype, "device": device}
    inputs = {"x": draw(*shape, **given, scale=2.0) + 1, "weight": draw(C, **weights, seed=1) + 1}
    if norm == "layer":
        inputs["bias"] = draw(C, **weights, seed=2)
    if residual:
        inputs["residual"] = draw(*shape, **given, seed=3)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm, residual, shape", [(*case, shape) for shape in SHAPES for case in CASES])
def test_output_and_gradients(norm, shape, dtype, residual, device):
    assert_gradients_close(*NORMS[norm], make(shape, dtype, device, norm=norm, residual=residual))


@pytest.mark.parametrize("C", [1024, 2047, 4096, 8191, 8193, 16385, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", NORMS)
def test_every_configuration(norm, C, device):
    inputs = make((2, C), torch.bfloat16, device, norm=norm, residual=norm == "layer", weight_dtype=torch.float32)
    assert_gradients_close(*NORMS[norm], inputs)


@pytest.mark.parametrize("C", [20, 8200])
@pytest.mark.parametrize("norm", NORMS)
def test_programs_that_own_several_row_tiles(norm, C, device, monkeypatch):
    monkeypatch.setattr(configs, "norm_programs", lambda cols: 3)
    assert_gradients_close(*NORMS[norm], make((45, C), torch.float32, device, norm=norm, residual=False))


def test_a_far_mean_does_not_cancel(device):
    """Chunks are merged by their moments: sums of squares would lose a variance of 1 beside a mean of 1000."""
    C = 20000
    inputs = {"x": draw(2, C, device=device) + 1000, "weight": torch.ones(C, device=device)}
    ours = mk.layer_norm(**inputs, backend="triton")
    wide = layer_norm_reference(**{name: value.double() for name, value in inputs.items()})
    torch.testing.assert_close(ours.double(), wide, rtol=0, atol=2e-3)


@pytest.mark.parametrize("C", [33, 8200])
def test_nan_beside_the_rows_never_leaks_in(C, device):
    plain = make((3, C), torch.float32, device, norm="layer", residual=True)
    strided = {name: fenced(value) if value.ndim == 2 else value for name, value in plain.items()}
    for values in (plain, strided):
        for value in values.values():
            value.requires_grad_()
    results = []
    for values in (plain, strided):
        y, h = mk.layer_norm(**values, backend="triton")
        seed = fenced(torch.ones_like(y)) if values is strided else torch.ones_like(y)
        results.append((y, h, *torch.autograd.grad((y, h), list(values.values()), (seed, 2 * seed))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_columns_that_are_not_contiguous(device):
    inputs = make((6, 34), torch.bfloat16, device, norm="rms", residual=True)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["residual"] = inputs["residual"][:1].expand(6, 34)
    assert_gradients_close(*NORMS["rms"], inputs)


def test_weight_gradients_repeat_bit_for_bit(device):
    inputs = make((50, 65), torch.float32, device, norm="layer", residual=False)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    first, second = (
        torch.autograd.grad(mk.layer_norm(**leaves, backend="triton").square().sum(), list(leaves.values()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm, device, unguarded):
    v = make((3, 5, 7), torch.float32, device, norm=norm, residual=True)
    v = {name: value.requires_grad_() for name, value in v.items()}
    arguments = (v["x"], v["weight"], v.get("bias"), v["residual"], 1e-5, norm == "layer", "triton")
    torch.library.opcheck(torch.ops.megakern.norm.default, arguments)


def test_compiles_in_one_graph(device):
    v = make((3, 16), torch.bfloat16, device, norm="layer", residual=True)

    def both(layer_norm, rms_norm, x, weight, bias, residual):
        y, h = layer_norm(x, weight, bias, residual=residual)
        return rms_norm(y + h, weight)

    ours = torch.compile(partial(both, *(op for op, _ in NORMS.values())), fullgraph=True, backend="aot_eager")
    assert_gradients_close(ours, partial(both, layer_norm_reference, rms_norm_reference), v)
