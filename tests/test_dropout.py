"""dropout: the mask bit for bit against Python integers, its statistics, gradients. No device needed."""

from __future__ import annotations

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

import megakern as mk
from megakern.kernels.torch import dropout as kernel
from megakern.ops.dropout import dropout, dropout_reference
from tests.closeness import assert_gradients_close

SEED = 0x123456789ABCDEF


def ones_kept(shape, p, seed, row_offset=0) -> torch.Tensor:
    return dropout(torch.ones(shape), p, seed, row_offset=row_offset) > 0


def python_bits(seed, row, column):
    """The 32 bits of an element, with the sign bit turned: unsigned order is then the definition's signed order."""
    wide, narrow, golden = 2**64, 2**32, 0x9E3779B97F4A7C15

    def splitmix(z):
        z ^= z >> 30
        z = z * 0xBF58476D1CE4E5B9 % wide
        z ^= z >> 27
        z = z * 0x94D049BB133111EB % wide
        return z ^ z >> 31

    key = splitmix((splitmix(seed) + (row + 1) * golden) % wide)
    x = (column * (golden >> 32) + key) % narrow
    x = (x ^ x >> 16) * 0x7FEB352D % narrow ^ key // narrow
    return ((x ^ x >> 15) * 0x846CA68B + 2**31) % narrow


def python_mask(p, seed, rows, columns):
    return torch.tensor([[python_bits(seed, row, column) >= int(p * 2**32) for column in columns] for row in rows])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-3])
@pytest.mark.parametrize("seed", [0, 1, SEED, (1 << 63) - 1])
def test_mask_is_the_definition_bit_for_bit(p, seed):
    for row_offset in (0, 5, (1 << 33) + 7):
        expected = python_mask(p, seed, range(row_offset, row_offset + 11), range(37))
        assert torch.equal(ones_kept((11, 37), p, seed, row_offset), expected)
        blocks = [row_offset + i for first in (0, 20, 40) for i in range(first, first + 4)][:11]
        out = dropout(torch.ones(11, 37), p, seed, row_offset=row_offset, row_blocks=(4, 20)) > 0
        assert torch.equal(out, python_mask(p, seed, blocks, range(37)))


def test_an_element_at_the_threshold_is_kept():
    bits = python_bits(SEED, 2, 3)
    for step, kept in ((-1, True), (0, True), (1, False)):
        assert ones_kept((4, 4), (bits + step) / 2**32, SEED)[2, 3] == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 3, 31), (0, 8), (5,)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_values_and_gradients(dtype, shape, with_residual):
    g = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(shape, generator=g).to(dtype)}
    if with_residual:
        inputs["residual"] = torch.randn(shape, generator=g).to(dtype)
    constants = {"p": 0.3, "seed": SEED, "row_offset": 3, "row_blocks": (2, 7)}
    assert_gradients_close(
        lambda **v: dropout(**v, **constants), lambda **v: dropout_reference(**v, **constants), inputs
    )


def test_the_mask_does_not_depend_on_blocks_dtype_strides_or_layout(monkeypatch):
    whole = ones_kept((60, 50), 0.2, SEED)
    halves = torch.cat([ones_kept((25, 50), 0.2, SEED), ones_kept((35, 50), 0.2, SEED, 25)])
    strided = dropout(torch.ones(50, 60).t(), 0.2, SEED) > 0
    narrow = dropout(torch.ones(3, 20, 50).bfloat16(), 0.2, SEED).view(60, 50) > 0
    monkeypatch.setattr(kernel, "BLOCK", 130)
    for other in (halves, strided, narrow, ones_kept((60, 50), 0.2, SEED)):
        assert torch.equal(whole, other)


def test_rate_zero_is_identity():
    x, residual = torch.randn(3, 4), torch.randn(3, 4)
    assert dropout(x, 0.0, None) is x
    assert torch.equal(dropout(x, 0.0, None, residual=residual), x + residual)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_statistics(p):
    """Means of the whole, of rows and of columns, and correlations of neighbours, at the size chance gives them."""
    M, C = 2000, 512
    z = (ones_kept((M, C), p, SEED).double() - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0, variance 1 when independent
    assert abs(z.mean()) * (M * C) ** 0.5 < 4
    rows, columns = z.mean(1) * C**0.5, z.mean(0) * M**0.5
    for sums in (rows, columns):
        n = sums.numel()
        assert abs(sums.square().mean() - 1) < 5 * (2 / n) ** 0.5  # chi-squared
        assert sums.abs().max() < 5
    other_seed = (ones_kept((M, C), p, SEED + 1).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    pairs = {
        "columns": z[:, 1:] * z[:, :-1],
        "columns by 2": z[:, 2:] * z[:, :-2],
        "columns by 256": z[:, 256:] * z[:, :-256],
        "rows": z[1:] * z[:-1],
        "rows by 64": z[64:] * z[:-64],
        "diagonal": z[1:, 1:] * z[:-1, :-1],
        "seeds": z * other_seed,
        "three": z[:, 2:] * z[:, 1:-1] * z[:, :-2],
    }
    for name, product in pairs.items():
        assert abs(product.mean()) * product.numel() ** 0.5 < 4, name
    correlation = z[:300] @ z[:300].t() / C**0.5
    assert correlation.fill_diagonal_(0).abs().max() < 6.5  # 45k pairs of rows; p = 0.1 has heavier tails than a normal


def test_opcheck():
    x, residual = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    for r in (None, residual):
        library.opcheck(torch.ops.megakern.dropout.default, (x, r, 0.5, SEED, [2, 2, 5], "torch"))


def test_compiles_once_for_all_seeds():
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(6, 8)
    compiled = torch.compile(lambda x, seed: dropout(x, 0.5, seed, residual=x), fullgraph=True, backend=counter)
    for seed in (SEED, SEED + 1, 7, 1 << 62):
        leaf, eager_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = compiled(leaf, seed), dropout(eager_leaf, 0.5, seed, residual=eager_leaf)
        out.sum().backward()
        expected.sum().backward()
        assert torch.equal(out, expected) and torch.equal(leaf.grad, eager_leaf.grad)
    assert counter.frame_count <= 2


def test_explains_itself():
    assert mk.explain("dropout", torch.ones(2, 3), 0.1, 5).chosen == "torch"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 0)}, ValueError, r"x must have shape \(\.\.\., C\) with C > 0"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16"),
        ({"p": 1.0}, ValueError, "p must be at least 0 and less than 1, got 1.0"),
        ({"p": -0.1}, ValueError, "p must be at least 0 and less than 1, got -0.1"),
        ({"p": float("nan")}, ValueError, "p must be at least 0"),
        ({"seed": None}, ValueError, "p is 0.5, so a seed is needed"),
        ({"seed": torch.tensor(3)}, TypeError, "seed must be a Python int, got Tensor"),
        ({"seed": -1}, ValueError, r"seed must be at least 0 and less than 2\*\*63, got -1"),
        ({"seed": 1 << 63}, ValueError, r"seed must be at least 0 and less than 2\*\*63"),
        ({"row_offset": -1}, ValueError, "row_offset must be at least 0, got -1"),
        ({"row_blocks": (3, 2)}, ValueError, r"row_blocks must be \(length, stride\) .* got \(3, 2\)"),
        ({"row_blocks": (0, 2)}, ValueError, r"row_blocks must be \(length, stride\)"),
        ({"residual": torch.ones(4)}, ValueError, r"residual must have shape of x = \(3, 4\), got \(4,\)"),
        ({"residual": torch.ones(3, 4).half()}, TypeError, "residual must have the dtype of x"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"x": torch.ones(3, 4), "p": 0.5, "seed": 1, **change}
    with pytest.raises(error, match=message):
        dropout(**arguments)
