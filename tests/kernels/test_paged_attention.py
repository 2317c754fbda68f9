"""Attention of few queries by compiled kernels, over dense keys and over pages, split or not, against float64."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.kernels.triton import configs
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from megakern.ops.paged_attention import paged_attention
from tests.closeness import assert_close_to_ref
from tests.kernels.conftest import INTERPRETED
from tests.kernels.inputs import draw, fenced
from tests.paging import dense, paged

OP = "paged_attention"
pytestmark = pytest.mark.only("triton")  # the C++ kernels have no fp32: test_attention_decode.py
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
LENGTHS = [70, 33, 0]
OPTIONS = [
    {},
    {"causal": False},
    {"window": (20, None)},
    {"window": (40, 1), "causal": False, "softcap": 1.5},
    {"scale": -0.3},
]


@pytest.fixture(params=[1, 5], ids=["whole", "split"])
def pieces(request, monkeypatch):
    """Keys in one piece, and in five, the last of which have none."""
    monkeypatch.setattr(configs, "key_splits", lambda *sizes: request.param)


def make(T, G, D, dtype, device, S=70):
    shapes = (3, T, 2 * G, D), (3, S, 2, D), (3, S, 2, D)
    return [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def check(results, q, k, v, lengths, **options):
    truth, same = (
        dense(attention_reference, *(x.to(d) for x in (q, k, v)), lengths, **options) for d in (torch.float64, q.dtype)
    )
    for name, out, wide, narrow in zip(("out", "lse"), results, truth, same, strict=True):
        out, wide, narrow = (x.masked_fill(x == -torch.inf, -9.0) for x in (out, wide.double(), narrow))
        assert_close_to_ref(out, wide, narrow, name=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [4, 128])
def test_pages(options, page_size, pieces, backend, device):
    """Pages smaller than a block of keys, and larger. Whatever is not a key of the sequence is NaN."""
    q, k, v = make(2, 2, 16, torch.float16, device)
    check(paged_attention(q, *paged(k, v, LENGTHS, page_size), return_lse=True, backend=backend, **options),
          q, k, v, LENGTHS, **options)  # fmt: skip


# One row, several blocks of rows of a group, a head dim that is no power of two, the largest.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, G, D", [(1, 1, 16), (1, 8, 40), (17, 4, 8), (3, 1, 256)])
def test_shapes(T, G, D, dtype, pieces, backend, device):
    q, k, v = make(T, G, D, dtype, device)
    check(paged_attention(q, *paged(k, v, LENGTHS, 16), return_lse=True, backend=backend), q, k, v, LENGTHS)


@pytest.mark.parametrize("options", OPTIONS)
def test_few_rows_over_dense_keys(options, pieces, backend, device):
    """mk.attention takes the same kernels; here between NaN, and with a slope for each head and sample."""
    q, k, v = make(3, 2, 20, torch.float32, device)
    slopes = draw(3, 4, device=device, seed=7, scale=0.3)
    results = attention(q, fenced(k), fenced(v), alibi_slopes=slopes, return_lse=True, backend=backend, **options)
    check(results, q, k, v, [70] * 3, alibi_slopes=slopes, **options)


def test_gradients_after_a_split_forward_pass(pieces, backend, device):
    leaves = [[x.clone().requires_grad_() for x in make(3, 2, 16, torch.float32, device)] for _ in range(2)]
    attention(*leaves[0], backend=backend).sum().backward()
    attention(*leaves[1], backend="torch").sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_repeats_are_bit_identical(pieces, backend, device):
    q, k, v = make(1, 4, 16, torch.float16, device)
    given = paged(k, v, LENGTHS, 16)
    first, second = (paged_attention(q, *given, return_lse=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck_and_compile(backend, device, unguarded):
    q, k, v = make(1, 2, 16, torch.float32, device)
    given = paged(k, v, LENGTHS, 16)
    torch.library.opcheck(
        torch.ops.megakern.paged_attention.default, (q, *given, None, [4, 0], 0.3, 2.0, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(lambda *x: paged_attention(*x, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *given), paged_attention(q, *given, backend=backend))


def test_pieces_fill_the_machine_and_repeat_anywhere(backend, device):
    config = configs.attention_decode(8, 128, torch.bfloat16)
    assert configs.key_splits(256, 8192, config) == 1, "one for each place is enough"
    assert configs.key_splits(8, 8192, config) == 29 and configs.key_splits(1, 100, config) == 1
    assert configs.key_splits(0, 100, config) == 1
    q, k, v = make(1, 8, 128, torch.float16, device)
    for explained in (mk.explain(paged_attention, q, *paged(k, v, LENGTHS, 16), backend=backend),
                      mk.explain(attention, q, k, v, backend=backend)):  # fmt: skip
        assert f"decode '{config.name}'" in str(explained)
