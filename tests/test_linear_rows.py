"""Linear layers of a few rows on their C++ kernel: against float64, bit for bit over threads and rows, refusals."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.kernels.torch import native
from megakern.ops.activation import KINDS, activation_reference
from tests.closeness import assert_close_to_ref
from tests.test_cpu_kernels import DTYPES, draw, needs_kernels, same_bits_with_three_threads

pytestmark = needs_kernels

# (M, N, K): one of each, a block of outputs and one more, odd depths, each number of rows that has its own code.
FEW_ROWS = [
    (1, 1, 1),
    (1, 17, 33),
    (2, 16, 32),
    (3, 5, 100),
    (4, 47, 16),
    (5, 33, 31),
    (6, 8, 64),
    (7, 40, 7),
    (8, 130, 257),
]


@pytest.mark.parametrize(
    "dtype, weight_dtype", [(DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[1]), (DTYPES[1], DTYPES[0])]
)
@pytest.mark.parametrize("shape", FEW_ROWS)
def test_few_rows(shape, dtype, weight_dtype):
    """Each activation with one shape, with and without bias and residual; x is a view of wider rows."""
    M, N, K = shape
    kind = ["", *KINDS][sum(shape) % (len(KINDS) + 1)]
    x, weight = draw(M, K + 5, dtype=dtype, scale=1.0)[:, :K], draw(N, K, dtype=weight_dtype, seed=1, scale=1.0)
    bias, residual = draw(N, seed=2, dtype=weight_dtype), draw(M, N, dtype=dtype, seed=3)
    if N % 2:
        bias = residual = None

    def formula(wide):
        z = x.to(wide) @ weight.to(dtype).to(wide).t()
        z = z if bias is None else z + bias.to(wide)
        y = activation_reference(z, kind) if kind else z
        return (y if residual is None else y + residual.to(wide)), z

    def ours(rows=slice(None)):
        added = None if residual is None else residual[rows]
        assert native.takes_few_rows(x[rows], weight, bias, added)
        y, pre = (torch.empty(x[rows].shape[0], N, dtype=dtype) for _ in range(2))
        native.few_rows(x[rows], weight, bias, added, kind, y, pre)
        assert torch.equal(native.few_rows(x[rows], weight, bias, added, kind, torch.empty_like(y)), y)
        return y, pre

    found = same_bits_with_three_threads(ours)
    for name, out, wide, same in zip(("y", "pre"), found, formula(torch.float64), formula(dtype), strict=True):
        assert_close_to_ref(out, wide, same, name=name)
    assert torch.equal(ours(slice(M - 1, M))[0], found[0][-1:]), "a row depends on those beside it"


def test_linear_of_few_rows_runs_on_its_kernel(monkeypatch):
    called, kernel = [], native.few_rows
    monkeypatch.setattr(native, "few_rows", lambda *a: called.append(a[0].shape[0]) or kernel(*a))
    weight = draw(6, 8, seed=1)
    for rows in (1, 8, 9):
        mk.linear(draw(rows, 8), weight)
    with native.composites_only():
        mk.linear(draw(1, 8), weight)
    mk.linear(draw(1, 8), draw(8, 6).t())  # a weight that does not lie row by row
    assert called == [1, 8]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"M": 9}, "M must be between 1 and 8, got 9"),
        ({"x_stride": 7}, "row stride of x must be at least K"),
        ({"weight_dtype": 1}, "weight must be fp32 or of x's dtype"),
        ({"bias_dtype": 1}, "bias must be fp32 or of x's dtype"),
        ({"activation": 5}, "activation code must be 0 to 4, got 5"),
        ({"threads": 0}, "threads must be positive"),
    ],
)
def test_few_rows_refuses(change, message):
    sizes = {"M": 1, "N": 6, "K": 8, "x_stride": 8, "dtype": 0, "weight_dtype": 0, "bias_dtype": 0, "activation": 0}
    problem = native._cpu.LinearRowsProblem(*({**sizes, "threads": 1} | change).values())
    x, weight, y = draw(1, 8), draw(6, 8), torch.empty(1, 6)
    with pytest.raises(ValueError, match=message):
        native._cpu.linear_rows(problem, x.data_ptr(), weight.data_ptr(), 0, 0, 0, y.data_ptr())
