"""The AMX products where rows of x are read as they lie, and where a weight gradient is made of many blocks."""

from __future__ import annotations

import pytest
import torch

from megakern.kernels.torch import native
from tests.closeness import assert_close_to_ref
from tests.test_cpu_kernels import draw, needs_kernels, require, threads


def lying(x, stride, first):
    """x (M, K) in rows that are `stride` apart, from element `first` of a line of 64 bytes on; NaN lies between."""
    memory = torch.full((x.shape[0] * stride + 96,), torch.nan, dtype=x.dtype)
    start = -memory.data_ptr() // x.element_size() % 32 + first
    rows = memory[start : start + x.shape[0] * stride].view(-1, stride)[:, : x.shape[1]]
    return rows.copy_(x)


# (M, N, K): whole panels of 32 rows and one more; less than one; several blocks of rows; weights that leave L2.
@needs_kernels
@pytest.mark.parametrize("shape", [(64, 40, 96), (97, 33, 64), (5, 40, 32), (700, 64, 1536), (290, 900, 960)])
def test_rows_as_they_lie_give_the_bits_of_packed_ones(shape):
    require("amx_bf16")
    M, N, K = shape
    x, weight = draw(M, K, dtype=torch.bfloat16, scale=1.0), draw(N, K, seed=1, scale=K**-0.5)
    results = []
    # As they lie: contiguous, and with room between the rows. Packed: off a line, and at distances that are.
    for stride, first in ((K, 0), (K + 64, 0), (K, 1), (K + 3, 0)):
        for count in (1, 3):
            with threads(count):
                y = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
                results.append(native.product(lying(x, stride, first), weight, None, None, "", y))
    assert all(torch.equal(y, results[0]) for y in results[1:])
    rounded = weight.bfloat16()
    assert_close_to_ref(results[0], x.double() @ rounded.double().t(), x @ rounded.t())


@needs_kernels
@pytest.mark.parametrize("shape", [(300, 1600, 700), (70, 40, 2100), (270, 2100, 40)])
def test_weight_gradients_do_not_depend_on_their_blocks(shape):
    """Each number of threads has its own blocks."""
    require("amx_bf16")
    M, N, K = shape
    dy, x = draw(M, N, dtype=torch.bfloat16), draw(M, K, dtype=torch.bfloat16, seed=1)
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            out = torch.full((N, K), torch.nan)
            results.append((out, native.weight_gradient(dy, x, out, add=False, with_sums=True)))
    for out, sums in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(sums, results[0][1])
    assert_close_to_ref(results[0][0], dy.double().t() @ x.double(), dy.float().t() @ x.float(), name="dweight")
    assert_close_to_ref(results[0][1], dy.double().sum(0), dy.float().sum(0), name="sums")
