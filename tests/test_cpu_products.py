"""The AMX products where rows of x are read as they lie, where the derivative of an activation follows, and where a
weight gradient is made of many blocks."""

from __future__ import annotations

import pytest
import torch

from megakern.kernels.torch import mlp, native
from megakern.ops.activation import KINDS
from tests.closeness import assert_close_to_ref
from tests.test_cpu_kernels import draw, needs_kernels, require, same_bits_with_three_threads, threads


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


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 5, 7), (97, 70, 64), (300, 40, 290)])
def test_the_derivative_follows_the_product(monkeypatch, kind, shape):
    """dpre = (dy W) act'(pre) from the launcher, in one kernel where the shape has one; nothing written beside."""
    require("amx_bf16")
    M, N, F = shape
    dy, weight = draw(M, N, dtype=torch.bfloat16, scale=1.0), draw(N, F, seed=1, scale=N**-0.5)
    pre = draw(M, F, seed=2, dtype=torch.bfloat16)
    calls, product = [], native.product
    monkeypatch.setattr(native, "product", lambda *a, **k: calls.append(k.get("derivative")) or product(*a, **k))

    def ours():
        return (mlp.linear_activation_gradient(dy, weight, pre, None, kind)[0],)

    (dpre,) = same_bits_with_three_threads(ours)
    assert calls == [True] * 3
    memory = torch.full((M * F + 2,), 7.0, dtype=torch.bfloat16)
    how = {"transposed": True, "derivative": True}
    native.product(dy, weight, None, None, kind, memory[1:-1].view(M, F), pre, **how)
    assert memory[0] == memory[-1] == 7.0 and torch.equal(memory[1:-1].view(M, F), dpre)
    with native.composites_only():
        wide = [t.double() for t in (dy, weight.bfloat16(), pre)]
        reference, _ = mlp.linear_activation_gradient(*wide, None, kind)
        (composite,) = ours()
    assert_close_to_ref(dpre, reference, composite)


@needs_kernels
@pytest.mark.parametrize(
    "activation, bias, residual, pre",
    [(0, 0, 0, 1 << 23), (1, 0, 0, 0), (1, 1 << 24, 0, 1 << 23), (1, 0, 1 << 24, 1 << 23), (1, 0, 0, 1 << 22)],
)
def test_the_binding_refuses_other_derivatives(activation, bias, residual, pre):
    require("amx_bf16")
    from megakern import _cpu

    problem = _cpu.LinearProblem(4, 4, 4, 4, 0, True, activation, True, 1)
    with pytest.raises(ValueError, match="the derivative is that of an activation, with pre beside y, without bias"):
        _cpu.linear(problem, 1 << 20, 1 << 21, bias, residual, pre, 1 << 22)
