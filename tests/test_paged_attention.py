"""paged_attention against attention over the same keys, dense, one sequence at a time. No device needed."""

from __future__ import annotations

import pytest
import torch
from torch import library

import megakern as mk
from megakern.ops.attention_reference import attention_reference
from megakern.ops.paged_attention import paged_attention, paged_attention_reference
from tests.closeness import assert_close_to_ref
from tests.paging import dense, paged

OPTIONS = [
    {},
    {"causal": False},
    {"window": (5, None)},
    {"window": (4, 2), "causal": False, "softcap": 1.5},
    {"alibi_slopes": torch.tensor([[0.5, 0.25, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.5, 0.2]]), "scale": 0.3},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
]


def make(T=2, S=37, dtype=torch.float32, H=4, Hkv=2, D=8):
    g = torch.Generator().manual_seed(1)
    shapes = (3, T, H, D), (3, S, Hkv, D), (3, S, Hkv, D)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_pages_change_nothing(options, page_size, dtype):
    """A full cache, one whose last page is nearly empty, and no keys at all."""
    q, k, v = make(dtype=dtype)
    lengths = [37, 33, 0]
    truth, same = (dense(attention_reference, *(x.to(d) for x in (q, k, v)), lengths, **options)
                   for d in (torch.float64, dtype))  # fmt: skip
    given = paged(k, v, lengths, page_size)
    for function in (paged_attention_reference, paged_attention):
        results = function(q, *given, **options, return_lse=True)
        for name, out, wide, narrow in zip(("out", "lse"), results, truth, same, strict=True):
            out, wide, narrow = (x.masked_fill(x == -torch.inf, -9.0) for x in (out, wide.double(), narrow))
            assert_close_to_ref(out, wide, narrow, name=name)
        assert torch.equal(function(q, *given, **options), results[0])


def test_no_sequences():
    q, k, v = (x[:0] for x in make())
    out, lse = paged_attention(q, *paged(k, v, [], 4), return_lse=True)
    assert out.shape == (0, 2, 4, 8) and lse.shape == (0, 4, 2)


def test_opcheck_and_compile():
    q, k, v = make()
    given = paged(k, v, [37, 20, 3], 16)
    library.opcheck(
        torch.ops.megakern.paged_attention.default, (q, *given, None, [4, 0], 0.3, 2.0, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    compiled = torch.compile(lambda *x: paged_attention(*x, window=(8, None)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *given), paged_attention(q, *given, window=(8, None)))


def test_explains_itself():
    q, k, v = make()
    explanation = mk.explain(mk.paged_attention, q, *paged(k, v, [5, 6, 7], 16))
    assert explanation.chosen == "torch" and explanation.problem.sizes["page_size"] == 16


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(3, 4, 8)}, ValueError, r"q must have shape \(B, T, H, D\), got \(3, 4, 8\)"),
        ({"k_cache": torch.ones(3, 2, 8)}, ValueError, r"k_cache must have shape \(pages, page_size, Hkv, D\)"),
        ({"v_cache": torch.ones(3, 16, 2, 8)}, ValueError, "v_cache must have shape of k_cache"),
        ({"q": torch.ones(3, 1, 4, 8).half()}, TypeError, "k_cache must have the dtype of q"),
        ({"q": torch.ones(3, 1, 4, 4)}, ValueError, "q and k_cache must have the same head dim, at least 1, got 4 and"),
        ({"q": torch.ones(3, 1, 3, 8)}, ValueError, "Hkv = 2, must divide the heads of q, H = 3"),
        (dict.fromkeys(("k_cache", "v_cache"), torch.ones(9, 12, 2, 8)), ValueError, "a power of two, got 12"),
        (
            {"block_table": torch.zeros(3, 4).long()},
            ValueError,
            r"block_table must be int32 .* got torch.int64 \(3, 4\)",
        ),
        ({"block_table": torch.zeros(2, 4).int()}, ValueError, r"block_table must be int32 of shape .* with B = 3"),
        ({"lengths": torch.zeros(3, 1).int()}, ValueError, r"lengths must be int32 of shape \(B,\) with B = 3"),
        ({"lengths": torch.zeros(3, device="meta").int()}, ValueError, "lengths must be on the device of q"),
        ({"lengths": torch.tensor([5, 65, 2]).int()}, ValueError, "lengths must be between 0 and 64, the keys of 4"),
        ({"lengths": torch.tensor([5, -1, 2]).int()}, ValueError, "lengths must be between 0 and 64"),
        ({"block_table": torch.full((3, 4), 14).int()}, ValueError, "must be between 0 and 13, got 14 to 14"),
        ({"window": (-1, 2)}, ValueError, r"paged_attention: window must be \(left, right\)"),
        ({"softcap": -1.0}, ValueError, "paged_attention: softcap must be at least 0"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "paged_attention: alibi_slopes must be float32"),
        (
            {"q": torch.ones(3, 1, 4, 8).requires_grad_()},
            ValueError,
            r"has no gradient; call it under torch.no_grad\(\)",
        ),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    q, k, v = make(T=1)
    names = ("k_cache", "v_cache", "block_table", "lengths")
    given = dict(zip(names, paged(k, v, [37, 9, 1], 16), strict=True))
    assert given["k_cache"].shape[0] == 14
    with pytest.raises(error, match=message):
        paged_attention(**{"q": q, **given, **change})
