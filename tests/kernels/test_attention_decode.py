"""The C++ attention of few queries against float64: over dense keys and over pages, split or not. On a CPU too."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import attention_decode as launchers
from megakern.ops.attention import attention
from megakern.ops.paged_attention import paged_attention
from tests.kernels.inputs import draw, fenced
from tests.kernels.test_paged_attention import LENGTHS, OPTIONS, check, make
from tests.paging import paged

OP = "paged_attention"
pytestmark = pytest.mark.only("cuda", "simt")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 5], ids=["whole", "split"])
def pieces(request, monkeypatch):
    """Keys in one piece, and in five, the last of which have none."""
    monkeypatch.setattr(launchers, "key_splits", lambda *sizes: request.param)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 4, 128])
def test_pages(options, page_size, pieces, backend, device):
    """Pages smaller than a tile of keys, and larger. Whatever is not a key of the sequence is NaN."""
    q, k, v = make(2, 2, 16, torch.float16, device)
    check(paged_attention(q, *paged(k, v, LENGTHS, page_size), return_lse=True, backend=backend, **options),
          q, k, v, LENGTHS, **options)  # fmt: skip


# One row, a block of rows and more, head dims below, at and above the tiles; 300 keys: several rounds of the stages.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T, G, D, S", [(1, 1, 64, 70), (1, 8, 40, 70), (16, 4, 8, 300), (3, 1, 256, 300), (1, 16, 128, 300),
                   (5, 3, 192, 300), (2, 8, 96, 300), (1, 2, 64, 700)]
)  # fmt: skip
def test_shapes(T, G, D, S, dtype, pieces, backend, device):
    q, k, v = make(T, G, D, dtype, device, S=S)
    lengths = [S, S // 2 + 1, 0]
    check(paged_attention(q, *paged(k, v, lengths, 16), return_lse=True, backend=backend), q, k, v, lengths)


@pytest.mark.parametrize("options", OPTIONS)
def test_few_rows_over_dense_keys(options, pieces, backend, device):
    """mk.attention takes the same kernels; here between NaN, and with a slope for each head and sample."""
    q, k, v = make(3, 2, 24, torch.bfloat16, device)
    slopes = draw(3, 4, device=device, seed=7, scale=0.3)
    k, v = (fenced(x, before=16, after=8) for x in (k, v))
    results = attention(q, k, v, alibi_slopes=slopes, return_lse=True, backend=backend, **options)
    check(results, q, k, v, [70] * 3, alibi_slopes=slopes, **options)


def test_a_cache_of_odd_strides_is_copied(pieces, backend, device):
    q, k, v = make(1, 2, 16, torch.bfloat16, device)
    expected = attention(q, k, v, backend=backend)
    odd = [torch.empty(*x.shape[:-1], 19, dtype=x.dtype, device=device)[..., 1:17].copy_(x) for x in (q, k, v)]
    assert torch.equal(attention(*odd, backend=backend), expected)


def test_gradients_after_a_split_forward_pass(pieces, backend, device):
    leaves = [[x.clone().requires_grad_() for x in make(3, 2, 16, torch.bfloat16, device)] for _ in range(2)]
    attention(*leaves[0], backend=backend).sum().backward()
    attention(*leaves[1], backend="torch").sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=2e-2)


def test_repeats_are_bit_identical(pieces, backend, device):
    q, k, v = make(1, 4, 64, torch.bfloat16, device)
    given = paged(k, v, LENGTHS, 16)
    first, second = (paged_attention(q, *given, return_lse=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_sample(backend, device):
    q = make(1, 2, 16, torch.bfloat16, device)[0][:0]
    table = torch.zeros(0, 3, dtype=torch.int32, device=device)
    pages = torch.zeros(2, 4, 2, 16, dtype=torch.bfloat16, device=device)
    out, lse = paged_attention(q, pages, pages, table, table[:, 0], return_lse=True, backend=backend)
    assert out.shape == (0, 1, 4, 16) and lse.shape == (0, 4, 1)


def test_opcheck_and_compile(backend, device, unguarded):
    q, k, v = make(1, 2, 16, torch.float16, device)
    given = paged(k, v, LENGTHS, 16)
    torch.library.opcheck(
        torch.ops.megakern.paged_attention.default, (q, *given, None, [4, 0], 0.3, 2.0, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(lambda *x: paged_attention(*x, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *given), paged_attention(q, *given, backend=backend))


def test_pieces_fill_the_machine(backend, device):
    assert launchers.key_splits(256, 8192, 128) == 1, "one for each place is enough"
    assert launchers.key_splits(8, 8192, 128) == 29 and launchers.key_splits(1, 100, 128) == 1
    q, k, v = make(1, 8, 128, torch.float16, device)
    for explained in (mk.explain(paged_attention, q, *paged(k, v, LENGTHS, 16), backend=backend),
                      mk.explain(attention, q, k, v, backend=backend)):  # fmt: skip
        assert "keys split over blocks" in str(explained)


@pytest.mark.parametrize(
    "T, G, D, dtype, reason",
    [(17, 4, 64, torch.float16, "up to 64 rows .* got 68"),
     (1, 1, 20, torch.float16, "multiples of 8 up to 256, got 20"),
     (1, 1, 64, torch.float32, "bfloat16, float16, not torch.float32")],
)  # fmt: skip
def test_what_it_refuses(T, G, D, dtype, reason, backend, device):
    q, k, v = make(T, G, D, dtype, device)
    with pytest.raises(ValueError, match=reason):
        paged_attention(q, *paged(k, v, LENGTHS, 16), backend=backend)
