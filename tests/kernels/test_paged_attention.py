"""Attention of few queries by compiled kernels, over dense keys and over pages, split or not, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.cuda import attention_decode as launchers
from megakern.kernels.triton import attention_configs as configs
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from megakern.ops.paged_attention import paged_attention
from tests.closeness import assert_close_to_ref
from tests.kernels.conftest import INTERPRETED
from tests.kernels.inputs import draw, fenced
from tests.paging import dense, paged

OP = "paged_attention"
TRITON, CPP = pytest.mark.only("triton"), pytest.mark.only("cuda", "simt")
# The C++ kernels have no fp32. Triton's interpreter cannot multiply bf16.
DTYPES = [
    pytest.param(torch.float32, marks=TRITON),
    torch.float16,
    pytest.param(torch.bfloat16, marks=[CPP] if INTERPRETED else []),
]
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
    for module in (configs, launchers):
        monkeypatch.setattr(module, "key_splits", lambda *sizes: request.param)


def make(T, G, D, dtype, device, S=70, Hkv=2):
    shapes = (3, T, Hkv * G, D), (3, S, Hkv, D), (3, S, Hkv, D)
    return [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def check(results, q, k, v, lengths, **options):
    truth, same = (
        dense(attention_reference, *(x.to(d) for x in (q, k, v)), lengths, **options) for d in (torch.float64, q.dtype)
    )
    for name, out, wide, narrow in zip(("out", "lse"), results, truth, same, strict=True):
        out, wide, narrow = (x.masked_fill(x == -torch.inf, -9.0) for x in (out, wide.double(), narrow))
        assert_close_to_ref(out, wide, narrow, name=name)


@pytest.mark.parametrize("page_size, options", [
    *((4, options) for options in OPTIONS), (128, {}), (128, OPTIONS[3]), (1, {}),
    pytest.param(1, OPTIONS[3], marks=CPP),
])  # fmt: skip
def test_pages(page_size, options, pieces, backend, device):
    """Pages smaller than a block of keys, and larger. Whatever is not a key of the sequence is NaN."""
    q, k, v = make(2, 2, 16, torch.float16, device)
    check(paged_attention(q, *paged(k, v, LENGTHS, page_size), return_lse=True, backend=backend, **options),
          q, k, v, LENGTHS, **options)  # fmt: skip


# One row, several blocks of rows of a group, head dims below, at and above the tiles, one that is no power of two, the
# largest; 300 keys: several rounds of the stages.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, G, D, S", [
    (1, 8, 40, 70),
    *(pytest.param(*sizes, marks=TRITON) for sizes in ((1, 1, 16, 70), (17, 4, 8, 70), (3, 1, 256, 70))),
    *(pytest.param(*sizes, marks=CPP) for sizes in (
        (1, 1, 64, 70), (16, 4, 8, 300), (3, 1, 256, 300), (1, 16, 128, 300), (5, 3, 192, 300), (2, 8, 96, 300),
        (1, 2, 64, 700),
    )),
])  # fmt: skip
def test_shapes(T, G, D, S, dtype, pieces, backend, device):
    q, k, v = make(T, G, D, dtype, device, S=S, Hkv=1)
    lengths = [S, S // 2 + 1, 0]
    check(paged_attention(q, *paged(k, v, lengths, 16), return_lse=True, backend=backend), q, k, v, lengths)


@pytest.mark.only("cuda", "simt")
@pytest.mark.parametrize("loud", [slice(0, 8), slice(8, 16), slice(0, 16)], ids=["upper", "lower", "all"])
def test_scores_that_rise_from_tile_to_tile(loud, backend, device):
    """Of the rows that a thread has in the upper or in the lower half of a block, or of both: by less and by more than
    what a row's base bears before it follows, and by more than fp32 could. PyTorch in bf16 rounds scores of 800 to
    multiples of 4: no measure for this."""
    q, k, v = make(1, 16, 64, torch.bfloat16, device, S=700, Hkv=1)
    level = torch.tensor([0, 3, 9, 40, 400, 800], device=device).repeat_interleave(128)[:700]
    k[..., 0] = level.bfloat16()[:, None]
    q[..., 0] = 0.0
    q[..., loud, 0] = 8.0
    out = attention(q, k, v, backend=backend)
    wide = attention_reference(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), wide, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "D, dtype", [pytest.param(20, torch.float32, marks=TRITON), pytest.param(24, torch.bfloat16, marks=CPP)]
)
def test_few_rows_over_dense_keys(options, D, dtype, pieces, backend, device):
    """mk.attention takes the same kernels; here between NaN, and with a slope for each head and sample."""
    q, k, v = make(3, 2, D, dtype, device)
    slopes = draw(3, 4, device=device, seed=7, scale=0.3)
    k, v = (fenced(x, before=16, after=8 if D % 8 == 0 else 13) for x in (k, v))  # C++: rows of multiples of 16 bytes
    results = attention(q, k, v, alibi_slopes=slopes, return_lse=True, backend=backend, **options)
    check(results, q, k, v, [70] * 3, alibi_slopes=slopes, **options)


@pytest.mark.only("cuda", "simt")
def test_a_cache_of_odd_strides_is_copied(pieces, backend, device):
    q, k, v = make(1, 2, 16, torch.bfloat16, device)
    expected = attention(q, k, v, backend=backend)
    odd = [torch.empty(*x.shape[:-1], 19, dtype=x.dtype, device=device)[..., 1:17].copy_(x) for x in (q, k, v)]
    assert torch.equal(attention(*odd, backend=backend), expected)


@pytest.mark.parametrize(
    "dtype, rtol, atol",
    [
        pytest.param(torch.float32, 1e-4, 1e-5, marks=TRITON),
        pytest.param(torch.bfloat16, 2e-2, 2e-2, marks=CPP),
    ],
)
def test_gradients_after_a_split_forward_pass(dtype, rtol, atol, pieces, backend, device):
    leaves = [[x.clone().requires_grad_() for x in make(3, 2, 16, dtype, device)] for _ in range(2)]
    attention(*leaves[0], backend=backend).sum().backward()
    attention(*leaves[1], backend="torch").sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=atol)


def test_repeats_are_bit_identical(pieces, backend, device):
    q, k, v = make(1, 4, 64, torch.float16, device)
    given = paged(k, v, LENGTHS, 16)
    first, second = (paged_attention(q, *given, return_lse=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.only("cuda", "simt")
def test_no_sample(backend, device):
    q = make(1, 2, 16, torch.bfloat16, device)[0][:0]
    table = torch.zeros(0, 3, dtype=torch.int32, device=device)
    pages = torch.zeros(2, 4, 2, 16, dtype=torch.bfloat16, device=device)
    out, lse = paged_attention(q, pages, pages, table, table[:, 0], return_lse=True, backend=backend)
    assert out.shape == (0, 1, 4, 16) and lse.shape == (0, 4, 1)


def test_opcheck_and_compile(backend, device, unguarded):
    q, k, v = make(1, 2, 16, torch.float16, device)
    given = paged(k, v, LENGTHS, 16)
    library.opcheck(
        torch.ops.megakern.paged_attention.default, (q, *given, None, [4, 0], 0.3, 2.0, backend),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(lambda *x: paged_attention(*x, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *given), paged_attention(q, *given, backend=backend))


def test_pieces_fill_the_machine_and_repeat_anywhere(backend, device):
    """Their number is a function of the sizes alone, never of the GPU that is there."""
    last, said = 128, "keys split over blocks"
    splits = launchers.key_splits
    if backend == "triton":
        last = configs.attention_decode(8, 128, torch.bfloat16)
        splits, said = configs.key_splits, f"decode '{last.name}'"
    assert splits(256, 8192, last) == 1, "one for each place is enough"
    assert splits(8, 8192, last) == 29 and splits(1, 100, last) == 1
    assert backend != "triton" or splits(0, 100, last) == 1  # the C++ launcher has returned by then
    q, k, v = make(1, 8, 128, torch.float16, device)
    for explained in (mk.explain(paged_attention, q, *paged(k, v, LENGTHS, 16), backend=backend),
                      mk.explain(attention, q, k, v, backend=backend)):  # fmt: skip
        assert said in str(explained)


@pytest.mark.only("cuda", "simt")
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


@pytest.mark.parametrize("at", [5, 40, 70, 100, 140])
def test_one_key_outweighs_all(at, pieces, backend, device):
    """By e^150 and more, whichever warp or piece it belongs to: each of them counts for the maximum."""
    q, k, v = make(1, 1, 16, torch.float16, device, S=150)
    k[:, at] = q[:, 0] * 40
    check(attention(q, k, v, return_lse=True, backend=backend), q, k, v, [150] * 3)


@pytest.mark.only("cuda", "simt")
def test_more_pieces_than_a_warp_has_threads(backend, device, monkeypatch):
    """Keys in every piece, and one that outweighs all others in the last: in the sum, then in the maximum too."""
    monkeypatch.setattr(launchers, "key_splits", lambda *sizes: 36)
    q, k, v = (x[:1] for x in make(1, 1, 16, torch.float16, device, S=36 * 128, Hkv=1))
    check(attention(q, k, v, return_lse=True, backend=backend), q, k, v, [36 * 128])
    k[:, -1] = q[:, 0] * 40
    check(attention(q, k, v, return_lse=True, backend=backend), q, k, v, [36 * 128])
