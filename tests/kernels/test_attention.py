"""Attention of compiled kernels against float64: masks, groups, caps, dropout, packed sequences, every configuration.

Most tests shrink the tiles, so that small inputs cross all borders of blocks and the interpreter stays quick: it takes
a time for each program, so there are no more samples and heads than a test needs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import library

import megakern as mk
from megakern.kernels.triton import attention_configs as configs
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from tests.closeness import assert_gradients_close
from tests.kernels.conftest import INTERPRETED
from tests.kernels.inputs import draw, fenced

OP = "attention"
pytestmark = pytest.mark.only("triton")  # the C++ kernel has fewer options: test_attention_cuda.py
SEED = 0x5EED_1234_5678
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
BM, BN = 32, 16


@pytest.fixture
def small_tiles(monkeypatch):
    small = configs.Config("small", {"BM": BM, "BN": BN}, 4, 2)
    monkeypatch.setattr(configs, "attention", lambda role, *sizes: configs.Choice((small,)))


def make(B, T, S, H, Hkv, D, dtype=torch.float32, device="cpu"):
    shapes = {"q": (B, T, H, D), "k": (B, S, Hkv, D), "v": (B, S, Hkv, D)}
    return {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def check(inputs, backend, **options):
    """Outputs (out, lse) and gradients, against the reference. An lse of -inf counts as -9: inf - inf is NaN."""

    def finite(function):
        def call(**v):
            out, lse = function(**v, **options, return_lse=True)
            assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
            return out, lse.masked_fill(lse == -torch.inf, -9.0)

        return call

    assert_gradients_close(finite(partial(attention, backend=backend)), finite(attention_reference), inputs)


def results(inputs, backend, **options):
    """out, lse and gradients for a fixed gradient of out."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, lse = attention(**leaves, backend=backend, **options, return_lse=True)
    upstream = draw(*out.shape, dtype=out.dtype, device=out.device, seed=9)
    return [out, lse, *torch.autograd.grad(out, list(leaves.values()), upstream)]


# One row, as many rows and keys as a tile and one more or less, primes, T < S and T > S, groups of 1, 2, 3 heads.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 7, 1, 1, 16),
        (2, 1, 37, 4, 2, 8),
        (1, BM, BN, 2, 2, 16),
        (1, BM + 1, BN + 1, 3, 1, 32),
        (2, 2 * BM - 1, 3 * BN - 1, 2, 1, 13),
        (1, 7, 53, 2, 2, 80),
        (1, 53, 7, 2, 2, 1),
        (0, 4, 4, 2, 1, 8),
        (2, 0, 3, 2, 1, 8),
        (2, 3, 0, 2, 1, 8),
    ],
)
def test_causal_and_full(shape, dtype, backend, device, small_tiles):
    check(make(*shape, dtype, device), backend)
    check(make(*shape, dtype, device), backend, causal=False)


OPTIONS = [
    {"window": (3, None)},
    {"window": (0, 1), "causal": False},
    {"window": (20, 7), "causal": False},
    {"window": (None, 4), "causal": False},
    {"window": (40, 5)},  # causal makes right 0
    {"window": (33, 1), "causal": False, "softcap": 1.5},
    {"softcap": 0.8, "scale": 0.7},
    {"scale": -0.3},
    {"scale": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 2 * BM + 3, 2 * BM + 3, 1, 1, 8), (1, 40, 71, 1, 1, 4), (1, 71, 40, 1, 1, 4)])
def test_options(options, shape, backend, device, small_tiles):
    check(make(*shape, torch.float32, device), backend, **options)


@pytest.mark.parametrize("options", [{}, {"window": (9, 12), "causal": False, "softcap": 1.5}])
def test_alibi(options, backend, device, small_tiles):
    v = make(2, 40, 53, 2, 1, 8, torch.float32, device)
    slopes = torch.tensor([[0.5, 0.0625], [0.0, -0.1]], device=device)
    check(v, backend, alibi_slopes=slopes[0], **options)
    check(v, backend, alibi_slopes=slopes, **options)
    packed = {name: x[0] for name, x in v.items()}
    both = offsets(0, 7, 40, device=device), offsets(0, 20, 53, device=device)
    check(packed, backend, alibi_slopes=slopes, cu_seqlens=both, **options)


@pytest.mark.only("triton")
@pytest.mark.parametrize("D", [24, 40, 64, 96, 128, 192, 256])
def test_every_head_dim_and_its_own_tiles(D, backend, device):
    check(make(1, 140, 150, 2, 1, D, torch.float16, device), backend)


CANDIDATES = [(*key, config) for key, found in configs.ATTENTION.items() for config in found if key[1] >= 64]


@pytest.mark.only("triton")
@pytest.mark.parametrize("role, BD, config", CANDIDATES, ids=lambda value: getattr(value, "name", str(value)))
def test_every_configuration(role, BD, config, backend, device, monkeypatch):
    table = configs.attention  # for the other roles
    chosen = lambda asked, *how: configs.Choice((config,)) if asked == role else table(asked, *how)  # noqa: E731
    monkeypatch.setattr(configs, "attention", chosen)
    check(make(1, 135, 130, 1, 1, BD, torch.float16, device), backend, window=(70, None))


@pytest.mark.parametrize("options", [{}, {"window": (9, 12), "causal": False}, {"softcap": 2.0}])
def test_dropout(options, backend, device, small_tiles):
    more = {"dropout_p": 0.3, "seed": SEED, "dropout_offset": (5, 7)}
    check(make(2, 11, 19, 4, 2, 8, torch.float32, device), backend, **options, **more)


def offsets(*ends, device):
    return torch.tensor(ends, dtype=torch.int32, device=device)


# Sequences of 40, 0, 1, 33 and 5 queries with 50, 3, 0, 16 and 5 keys; the third sees nothing.
ENDS = (0, 40, 40, 41, 74, 79), (0, 50, 53, 53, 69, 74)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (20, 1), "causal": False, "softcap": 1.0}])
def test_packed(options, backend, device, small_tiles):
    packed = {name: x[0] for name, x in make(1, ENDS[0][-1], ENDS[1][-1], 2, 1, 8, torch.float32, device).items()}
    both = tuple(offsets(*ends, device=device) for ends in ENDS)
    check(packed, backend, cu_seqlens=both, **options)
    out, lse = attention(**packed, cu_seqlens=both, return_lse=True, backend=backend)
    assert out[40].abs().max() == 0 and (lse[:, 40] == -torch.inf).all()


def test_packed_dropout_counts_sequences_as_samples(backend, device, small_tiles):
    packed = {name: x[0] for name, x in make(1, 9, 13, 2, 1, 8, torch.float32, device).items()}
    both = offsets(0, 4, 4, 9, device=device), offsets(0, 7, 7, 13, device=device)
    check(packed, backend, cu_seqlens=both, dropout_p=0.4, seed=SEED, dropout_offset=(2, 3))


def test_one_sequence_and_none(backend, device, small_tiles):
    packed = {name: x[0] for name, x in make(1, 37, 37, 2, 1, 8, torch.float32, device).items()}
    one = offsets(0, 37, device=device)
    check(packed, backend, cu_seqlens=(one, one))
    empty = {name: x[:0] for name, x in packed.items()}
    none = offsets(0, device=device)
    out, lse = attention(**empty, cu_seqlens=(none, none), return_lse=True, backend=backend)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0)


def test_rows_that_see_nothing(backend, device, small_tiles):
    """T = 50, S = 6: the first 44 rows are above the keys."""
    out, lse, dq, dk, dv = results(make(2, 50, 6, 4, 2, 8, torch.float32, device), backend)
    assert (out[:, :44] == 0).all() and (lse[:, :, :44] == -torch.inf).all() and lse[:, :, 44:].isfinite().all()
    assert (dq[:, :44] == 0).all() and all(x.isfinite().all() for x in (out, dq, dk, dv))
    keys = results(make(1, 4, 90, 2, 1, 8, torch.float32, device), backend, causal=False, window=(3, 0))
    assert (keys[3][:, :80] == 0).all() and (keys[4][:, :80] == 0).all(), "keys that no row sees"


@pytest.mark.parametrize("causal", [True, False])
def test_large_scores_do_not_overflow(causal, backend, device, small_tiles):
    """Scores of up to 1e5, whose exponentials are far beyond fp32: nearly always one key has all the weight."""
    v = make(1, 40, 40, 2, 1, 8, torch.float32, device)
    v["q"], v["k"] = v["q"] * 300, v["k"] * 300
    out, lse, *gradients = results(v, backend, causal=causal)
    truth, true_lse = attention_reference(**{n: x.double() for n, x in v.items()}, causal=causal, return_lse=True)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse.double(), true_lse, rtol=4e-6, atol=0)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("D, options", [(16, {}), (20, {"causal": False}), (20, {"window": (5, 3), "causal": False})])
def test_nan_beside_the_tensors_never_leaks_in(D, options, backend, device, small_tiles):
    v = make(2, 37, 43, 2, 1, D, torch.float16, device)
    results_of = partial(results, backend=backend, **options)
    for one, other in zip(results_of(v), results_of({name: fenced(x) for name, x in v.items()}), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_a_packed_sequence_of_nan_spoils_no_other(backend, device, small_tiles):
    packed = {name: x[0] for name, x in make(1, 79, 74, 2, 1, 8, torch.float32, device).items()}
    both = tuple(offsets(*ends, device=device) for ends in ENDS)
    clean = results(packed, backend, cu_seqlens=both)
    packed["q"][41:74] = packed["k"][53:69] = packed["v"][53:69] = torch.nan
    spoilt = results(packed, backend, cu_seqlens=both)
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), clean, spoilt, strict=True):
        if name == "lse":
            one, other = one.t(), other.t()
        first, last = (53, 69) if name in ("dk", "dv") else (41, 74)
        assert torch.equal(one[:first], other[:first]) and torch.equal(one[last:], other[last:]), name
        assert other[last - 1].isnan().all(), name


def test_strides(backend, device, small_tiles):
    """Heads before rows, parts of one qkv tensor, and a last dim that is not contiguous."""
    v = make(2, 18, 18, 4, 2, 8, torch.float32, device)
    check({name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in v.items()}, backend)
    qkv = draw(2, 18, 4 * 8 + 2 * 2 * 8, device=device)
    check(dict(zip("qkv", (x.unflatten(-1, (-1, 8)) for x in qkv.split([32, 16, 16], -1)), strict=True)), backend)
    check({name: x.transpose(1, 3).contiguous().transpose(1, 3) for name, x in v.items()}, backend)


def test_repeats_are_bit_identical(backend, device, small_tiles):
    v = make(1, 40, 40, 2, 1, 16, torch.float16, device)
    options = {"dropout_p": 0.1, "seed": SEED, "deterministic": True}
    assert all(torch.equal(a, b) for a, b in zip(*(results(v, backend, **options) for _ in range(2)), strict=True))


@pytest.mark.only("triton")
def test_what_is_refused(backend, device):
    with pytest.raises(ValueError, match="Triton's attention kernels take head dims up to 256, not 257"):
        attention(**make(1, 2, 2, 1, 1, 257, device=device), backend=backend)
    if INTERPRETED:
        with pytest.raises(ValueError, match="interpreter multiplies bfloat16 matrices wrongly"):
            attention(**make(1, 2, 2, 1, 1, 16, torch.bfloat16), backend=backend)


@pytest.mark.only("triton")
def test_explains_itself(backend, device):
    explained = str(mk.explain(attention, **make(1, 65, 65, 1, 1, 100, torch.float16, device), backend=backend))
    for role in ("forward", "key-value gradient", "query gradient"):
        assert f"{role} '{configs.ATTENTION[role, 128][0].name}'" in explained


def test_opcheck(backend, device, unguarded, small_tiles):
    v = [x.requires_grad_() for x in make(1, 5, 7, 2, 1, 4, device=device).values()]
    slopes = torch.tensor([0.5, 0.1], device=device)
    how = ([4, 0], 0.3, 2.0, 0.5, [SEED, 1, 2], True, backend)
    library.opcheck(torch.ops.megakern.attention.default, (*v, None, None, slopes, *how))
    packed = [x.detach()[0].requires_grad_() for x in v]
    both = offsets(0, 2, 5, device=device), offsets(0, 4, 7, device=device)
    library.opcheck(torch.ops.megakern.attention.default, (*packed, *both, slopes, *how))


def test_compiles_in_one_graph(backend, device, small_tiles):
    ends = offsets(0, 4, 9, device=device)

    def several(q, k, v):
        out, lse = attention(q, k, v, window=(4, None), softcap=2.0, return_lse=True, backend=backend)
        out = out + attention(out, k, v, dropout_p=0.2, seed=SEED, backend=backend)
        return out + attention(out[0], k[0], v[0], cu_seqlens=(ends, ends), backend=backend), lse

    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    v = make(1, 9, 9, 2, 1, 8, device=device)
    leaves = [{name: x.clone().requires_grad_() for name, x in v.items()} for _ in range(2)]
    for one, other in zip(several(**leaves[0]), compiled(**leaves[1]), strict=True):
        torch.testing.assert_close(one, other)
        if one.requires_grad:
            one.sum().backward(), other.sum().backward()
    for name in v:
        torch.testing.assert_close(leaves[0][name].grad, leaves[1][name].grad)
