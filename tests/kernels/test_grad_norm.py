"""The sum of squares of every compiled backend against float64."""

from __future__ import annotations

import pytest
import torch
from torch import library

from megakern.ops.dispatch import launcher
from megakern.ops.grad_norm import gradient_norm
from tests.kernels.inputs import draw, fenced

OP = "clip_grad_norm_"

# Smallest, primes, beside one tile and one piece (1024, 4096 and 8192 elements), several pieces, empty.
SHAPES = [(1,), (7, 13), (1025,), (4097,), (8193,), (3, 40), (2, 8192), (0, 4)]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.float16)])
def test_gradient_norm(dtypes, device, backend):
    params = []
    for i, shape in enumerate(SHAPES):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtypes[i % len(dtypes)], device=device))
        param.grad = draw(*shape, dtype=param.dtype, device=device, seed=i)
        params.append(param)
    expected = sum(param.grad.double().square().sum() for param in params).sqrt()
    ours = gradient_norm(params, backend=backend)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    assert ours.shape == () and torch.equal(ours, gradient_norm(params, backend=backend))


def test_squares_of_views_and_of_nothing(device, backend):
    sum_of_squares = launcher(backend, "grad_norm", "sum_of_squares")
    field = draw(5, 9, device=device)
    torch.testing.assert_close(sum_of_squares([fenced(field)]), field.square().sum())
    torch.testing.assert_close(
        sum_of_squares([field.t(), field[:0], field[0, 1:4]]), field.square().sum() + field[0, 1:4].square().sum()
    )
    assert sum_of_squares([field[:0]]) == 0
    assert sum_of_squares([torch.full((3,), float("nan"), device=device)]).isnan()


def test_many_tensors(device, backend):
    """142 in a short list of addresses and 1142 in a long one; at odd addresses, of differing sizes."""
    sum_of_squares = launcher(backend, "grad_norm", "sum_of_squares")
    field = draw(4000, device=device)
    for count in (143, 1200) if backend != "triton" else (143,):  # Triton has one kind of list
        tensors = [field[i : 2 * i + 1] for i in range(count)]
        expected = sum(tensor.double().square().sum() for tensor in tensors)
        torch.testing.assert_close(sum_of_squares(tensors).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.only("cuda", "simt")
def test_pieces_are_few_and_fill_a_gpu():
    from megakern.kernels.cuda.grad_norm import piece_of

    assert piece_of(10) == piece_of(4096 * 4096) == 4096
    assert 4000 < 10**9 / piece_of(10**9) <= 4096


def test_opcheck_and_compile(device, backend, unguarded):
    tensors = [draw(*shape, device=device, seed=i) for i, shape in enumerate([(7, 13), (1025,)])]
    sum_of_squares = torch.ops.megakern.sum_of_squares
    library.opcheck(sum_of_squares.default, (tensors, backend))
    compiled = torch.compile(lambda *x: sum_of_squares(x, backend).sqrt(), fullgraph=True, backend="aot_eager")
    expected = sum(tensor.double().square().sum() for tensor in tensors).sqrt()
    torch.testing.assert_close(compiled(*tensors).double(), expected, rtol=1e-6, atol=0)
