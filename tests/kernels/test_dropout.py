"""The dropout of every compiled backend against the mask in Python integers and PyTorch's backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library

from megakern.ops.dropout import dropout, dropout_reference
from tests.closeness import assert_gradients_close
from tests.kernels.inputs import DTYPES, draw, fenced

OP = "dropout"


@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 3, 130)])
@pytest.mark.parametrize("p, seed, row_offset", [(0.1, 0, 0), (0.5, (1 << 63) - 1, (1 << 40) + 7), (0.999, 16, 1)])
def test_the_mask_is_that_of_the_definition(shape, p, seed, row_offset, device, backend):
    x = torch.ones(shape, device=device)
    ours = dropout(x, p, seed, row_offset=row_offset, backend=backend)
    torch.testing.assert_close(ours, dropout_reference(x, p, seed, row_offset=row_offset), rtol=1e-6, atol=0)
    assert torch.equal(ours != 0, dropout(x, p, seed, row_offset=row_offset, backend="torch") != 0)


def test_rows_in_blocks(device, backend):
    x = torch.ones(10, 40, device=device)
    options = {"row_offset": 3, "row_blocks": (4, 9)}
    torch.testing.assert_close(dropout(x, 0.5, 7, **options, backend=backend), dropout_reference(x, 0.5, 7, **options))


def test_the_mask_of_a_large_tensor_is_that_of_the_torch_backend(device, backend):
    x = torch.ones(150, 1500, device=device)
    masks = [dropout(x, 0.3, 99, backend=name) != 0 for name in ("torch", backend)]
    assert torch.equal(*masks) and 0.69 < masks[0].float().mean() < 0.71


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 33), (0, 3), (2, 1025), (3, 4104), (9, 64)])
def test_values_and_gradients_with_a_residual(shape, dtype, device, backend):
    inputs = {
        "x": draw(*shape, dtype=dtype, device=device),
        "residual": draw(*shape, dtype=dtype, device=device, seed=1),
    }
    assert_gradients_close(
        lambda x, residual: dropout(x, 0.2, 5, residual=residual, backend=backend),
        lambda x, residual: dropout(x, 0.2, 5, residual=residual, backend="torch"),
        inputs,
    )


def test_nan_beside_the_rows_never_leaks_in(device, backend):
    x, residual = draw(4, 33, device=device), draw(4, 33, device=device, seed=1)
    plain = dropout(x, 0.2, 5, residual=residual, backend=backend)
    assert torch.equal(plain, dropout(fenced(x), 0.2, 5, residual=fenced(residual, 3, 2), backend=backend))
    dropped_nan = dropout(torch.full_like(x, float("nan")), 0.9, 5, backend=backend)
    assert dropped_nan.isnan().all()


def test_opcheck_and_compile(device, backend, unguarded):
    x = draw(3, 5, 7, device=device).requires_grad_()
    library.opcheck(torch.ops.megakern.dropout.default, (x, x.detach(), 0.25, 3, [1, 1, 1], backend))
    op = partial(dropout, p=0.25, seed=3, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), op(x))
