"""The Triton linear layer against float64: epilogues, gradients, every configuration. Interpreter, or a GPU.

The interpreter multiplies bfloat16 matrices wrongly, so there products are tested in fp16 and fp32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megakern as mk
from megakern.kernels.triton import configs
from megakern.kernels.triton.linear import linear_accumulate_weight_gradient, linear_weight_gradient, product
from megakern.ops.activation import KINDS
from megakern.ops.linear import linear_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.conftest import INTERPRETED
from tests.kernels.inputs import draw, fenced

pytestmark = pytest.mark.only("triton")

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# (leading dims of x, N, K): smallest, primes, a tile of 64 and its neighbours, several tiles and steps, no rows.
SHAPES = [((1,), 1, 1), ((7,), 13, 5), ((2, 3), 65, 64), ((64,), 64, 63), ((130,), 70, 140), ((0,), 4, 8)]


def make(lead, N, K, dtype, device, *, bias=True, residual=True):
    inputs = {
        "x": draw(*lead, K, dtype=dtype, device=device),
        "weight": draw(N, K, dtype=dtype, device=device, seed=1, scale=K**-0.5),
        "bias": draw(N, device=device, seed=2),
        "residual": draw(*lead, N, dtype=dtype, device=device, seed=3),
    }
    wanted = {"x": True, "weight": True, "bias": bias, "residual": residual}
    return {name: value for name, value in inputs.items() if wanted[name]}


def check(inputs, activation=None):
    ours = partial(mk.linear, activation=activation, backend="triton")
    assert_gradients_close(ours, partial(linear_reference, activation=activation), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead, N, K", SHAPES)
def test_outputs_and_gradients(lead, N, K, dtype, device):
    check(make(lead, N, K, dtype, device))
    check(make(lead, N, K, dtype, device, bias=False, residual=False), "gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", KINDS)
def test_activations_with_everything(activation, dtype, device):
    check(make((9,), 17, 33, dtype, device), activation)


@pytest.mark.parametrize("config", [*configs.LINEAR, configs.LINEAR_FP32], ids=lambda config: config.name)
def test_every_configuration_and_programs_with_several_tiles(config, device, monkeypatch):
    """Bands of tile rows that are not full, and fewer programs than tiles."""
    from megakern.kernels.triton import linear

    tiles = {**config.tiles, "GROUP": 2}
    chosen = configs.Config(config.name, tiles, config.warps, config.stages)
    monkeypatch.setattr(configs, "linear", lambda *arguments, **options: chosen)
    monkeypatch.setattr(linear, "_processors", lambda device: 4)
    M, N, K = 2 * tiles["BM"] + 3, 2 * tiles["BN"] + 5, tiles["BK"] + 7
    a, b = (draw(*s, dtype=torch.float16, device=device, seed=i) for i, s in enumerate([(M, K), (N, K)]))
    out = torch.full((M, N), float("nan"), dtype=torch.float16, device=device)
    product(a, b.t(), out)
    wide = a.double() @ b.double().t()
    assert_close_to_ref(out, wide, wide.half())


def test_the_weight_gradient_is_added_in_fp32(device):
    dy, x = draw(300, 20, dtype=torch.float16, device=device), draw(300, 9, dtype=torch.float16, device=device, seed=1)
    start = draw(20, 9, device=device, seed=2)
    expected = start.double() + dy.double().t() @ x.double()
    for into in (start.clone(), fenced(start), start.t().contiguous().t()):
        linear_accumulate_weight_gradient(into, dy, x)
        torch.testing.assert_close(into.double(), expected, rtol=1e-5, atol=1e-4)
    dweight, dbias = linear_weight_gradient(dy, x, torch.float32, torch.float32)
    torch.testing.assert_close(dweight.double(), expected - start.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)
    dweight, dbias = linear_weight_gradient(dy, dy, None, torch.float16)
    assert dweight.numel() == 0 and dbias.dtype == torch.float16


def test_nan_beside_the_operands_never_leaks_in(device):
    inputs = make((10,), 30, 70, torch.float16, device)
    results = []
    for values in (inputs, {name: fenced(value) if value.ndim == 2 else value for name, value in inputs.items()}):
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        y = mk.linear(**leaves, activation="silu", backend="triton")
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_operands_with_other_strides(device):
    inputs = make((12,), 20, 36, torch.float32, device)
    inputs["x"] = inputs["x"].t().contiguous().t()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["residual"] = inputs["residual"][:1].expand(12, 20)
    check(inputs, "relu_squared")


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter cannot")
def test_the_interpreter_refuses_bf16_products():
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 matrices wrongly; use float16 or float32"):
        mk.linear(torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16(), backend="triton")


def test_opcheck_and_compile(device, unguarded):
    v = make((3,), 5, 7, torch.float32, device)
    arguments = [value.requires_grad_() for value in v.values()]
    torch.library.opcheck(torch.ops.megakern.linear.default, (*arguments, "gelu_tanh", True, "triton"))
    compiled = torch.compile(
        partial(mk.linear, activation="silu", backend="triton"), fullgraph=True, backend="aot_eager"
    )
    assert_gradients_close(compiled, partial(linear_reference, activation="silu"), v)
