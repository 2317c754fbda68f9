"""attention against the dense reference (which test_attention_reference.py checks). No device needed."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

import megakern as mk
from megakern.kernels.torch import attention as kernel
from megakern.kernels.torch import attention_tiles
from megakern.ops.attention_reference import attention_reference, visible_keys
from tests.closeness import assert_close_to_ref, assert_gradients_close

SEED = 0x5EED
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

pytestmark = pytest.mark.usefixtures("with_and_without_cpu_kernels", "products_in_fp32")


@pytest.fixture
def products_in_fp32(monkeypatch):
    """For bf16 too, so that every machine runs the same tests. `test_products_in_bf16` turns this off."""
    product_dtype = functools.cache(lambda dtype: torch.promote_types(dtype, torch.float32))
    product_dtype.__wrapped__ = kernel.product_dtype.__wrapped__
    monkeypatch.setattr(kernel, "product_dtype", product_dtype)


def make(B, T, S, H, Hkv, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(B, T, H, D, generator=g).to(dtype),
        "k": torch.randn(B, S, Hkv, D, generator=g).to(dtype),
        "v": torch.randn(B, S, Hkv, D, generator=g).to(dtype),
    }


def check(inputs, **options):
    """Outputs (out, lse) and gradients, against the reference. An lse of -inf counts as -9: inf - inf is NaN."""

    def finite(function):
        def call(**v):
            out, lse = function(**v, **options, return_lse=True)
            assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
            return out, lse.masked_fill(lse == -torch.inf, -9.0)

        return call

    assert_gradients_close(finite(mk.attention), finite(attention_reference), inputs)


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 5 rows and tiles of about 2 heads, so that small inputs cross all borders; no fused kernel."""
    monkeypatch.setattr(attention_tiles, "CHUNK", 5)
    monkeypatch.setattr(attention_tiles, "TILE", 200)
    monkeypatch.setattr(kernel, "_fused", lambda *arguments: None)


# Smallest, decoding (T = 1), as many rows as a chunk and one more or less, primes, T < S; groups of 1, 2, 3 heads.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 1, 37, 4, 2, 16),
        (2, 9, 9, 3, 3, 16),
        (1, 128, 128, 2, 2, 8),
        (1, 129, 129, 2, 1, 64),
        (3, 7, 31, 6, 2, 13),
        (2, 127, 131, 3, 3, 32),
        (0, 4, 4, 2, 1, 8),
        (2, 0, 3, 2, 1, 8),
    ],
)
def test_causal_and_full(shape, dtype):
    check(make(*shape, dtype))
    check(make(*shape, dtype), causal=False)


OPTIONS = [
    {},
    {"causal": False},
    {"window": (3, None)},
    {"window": (0, 1), "causal": False},
    {"window": (2, 7), "causal": False},
    {"window": (None, 4), "causal": False},
    {"window": (6, 5)},  # causal makes right 0
    {"window": (12, 1), "causal": False, "softcap": 1.5},
    {"softcap": 0.8, "scale": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 13, 13, 4, 2, 8), (3, 6, 17, 3, 3, 4), (1, 17, 6, 4, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_options_over_many_tiles(small_tiles, options, shape, dtype):
    check(make(*shape, dtype), **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_with_default_tiles(options):
    check(make(2, 133, 140, 2, 1, 8), **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_one_row(options):
    check(make(2, 1, 20, 4, 2, 8), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": False, "window": (4, 2), "softcap": 2.0}])
def test_alibi(small_tiles, options, dtype):
    """One slope a head, one a head and sample, and one a head and packed sequence."""
    slopes = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [1.0, 0.0, -0.1, 0.3], [0.3, 0.2, 0.1, 0.0]])
    v = make(3, 7, 9, 4, 2, 8, dtype)
    check(v, alibi_slopes=slopes[1], **options)
    check(v, alibi_slopes=slopes, **options)
    packed = {name: x[0] for name, x in v.items()}
    check(packed, alibi_slopes=slopes, cu_seqlens=(offsets(0, 3, 3, 7), offsets(0, 2, 5, 9)), **options)


def test_alibi_of_one_row_and_with_default_tiles():
    for T in (1, 133):
        check(make(2, T, 140, 2, 1, 8), alibi_slopes=torch.tensor([0.1, 0.01]))


def test_rows_that_see_one_key():
    """The probability is 1 whatever the score, so the output is v and no gradient reaches q and k."""
    v = {name: x.requires_grad_() for name, x in make(2, 21, 21, 2, 1, 8).items()}
    out = mk.attention(**v, causal=False, window=(0, 0))
    out.sum().backward()
    torch.testing.assert_close(out, v["v"].expand_as(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(v["v"].grad, torch.full_like(v["v"], 2.0), rtol=1e-6, atol=0)
    for name in "qk":
        assert v[name].grad.abs().max() < 1e-5, "against 1 for the gradient of the output"


def test_the_fused_kernel_is_chosen_only_where_its_mask_is_ours():
    chosen = 0
    for T, S, left, right in itertools.product(range(1, 5), range(1, 5), [-1, 0, 1, 2, 3, 4], [-1, 0, 1, 2, 3, 4]):
        rules = attention_tiles.Rules.of((left, right), 1.0, 0.0, 0.0, (0, 0, 0))
        fused = kernel._fused(torch.ones(1, T, 1, 2), torch.ones(1, S, 1, 2), rules)
        if fused is not None:
            keys, causal = fused
            mask = torch.zeros(T, S, dtype=torch.bool)
            mask[:, keys] = torch.ones(T, keys.stop - keys.start, dtype=torch.bool).tril(0 if causal else S)
            window = tuple(None if side < 0 else side for side in (left, right))
            assert torch.equal(mask, visible_keys(T, S, False, window)), (T, S, left, right)
            chosen += 1
    assert chosen > 200


def test_last_stride_that_is_not_one():
    v = {name: x.transpose(1, 3).contiguous().transpose(1, 3) for name, x in make(2, 9, 9, 3, 3, 8).items()}
    check(v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": False, "window": (4, 2)}, {"softcap": 2.0}])
def test_dropout(small_tiles, options, dtype):
    more = {"dropout_p": 0.3, "seed": SEED, "dropout_offset": (5, 7)}
    check(make(3, 7, 9, 4, 2, 8, dtype), **options, **more)


def test_dropout_is_the_same_under_every_layout():
    """Two ranks for heads, two for samples: the parts are those of the whole, bit for bit."""
    v = make(4, 9, 9, 4, 2, 8)
    whole = mk.attention(**v, dropout_p=0.5, seed=SEED)
    for b in (0, 2):
        for h in (0, 1):
            part = {"q": v["q"][b : b + 2, :, 2 * h : 2 * h + 2]}
            part.update({name: v[name][b : b + 2, :, h : h + 1] for name in ("k", "v")})
            out = mk.attention(**part, dropout_p=0.5, seed=SEED, dropout_offset=(b, 2 * h))
            torch.testing.assert_close(out, whole[b : b + 2, :, 2 * h : 2 * h + 2], rtol=1e-6, atol=1e-6)
    other = mk.attention(**v, dropout_p=0.5, seed=SEED + 1)
    assert (other - whole).abs().max() > 0.1


def test_dropout_keeps_the_mean():
    """Equal keys make p = 1/S, ones as values: out is the fraction kept / (1 - p), 1 on average with a known spread."""
    B, T, S, H, p = 4, 64, 256, 4, 0.2
    out = mk.attention(
        torch.zeros(B, T, H, 4), torch.zeros(B, S, H, 4), torch.ones(B, S, H, 4), causal=False, dropout_p=p, seed=SEED
    )[..., 0].double()
    deviation = math.sqrt(p / (1 - p) / S)
    assert abs(out.mean() - 1) < 4 * deviation / math.sqrt(out.numel())
    assert abs(out.std() / deviation - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (2, 1), "causal": False}, {"softcap": 1.0}])
def test_packed(small_tiles, options, dtype):
    """Sequences of 7, 0, 1 and 5 queries with 9, 3, 0 and 5 keys; the third sees nothing."""
    v = make(1, 13, 17, 4, 2, 8, dtype)
    offsets = tuple(torch.tensor(o, dtype=torch.int32) for o in ([0, 7, 7, 8, 13], [0, 9, 12, 12, 17]))
    packed = {name: x[0] for name, x in v.items()}
    check(packed, cu_seqlens=offsets, **options)
    check(packed, cu_seqlens=offsets, dropout_p=0.4, seed=SEED, dropout_offset=(2, 3), **options)
    out, lse = mk.attention(**packed, cu_seqlens=offsets, return_lse=True)
    assert out[7].abs().max() == 0 and (lse[:, 7] == -torch.inf).all()


def test_packed_without_sequences():
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = mk.attention(*(torch.ones(0, 2, 4) for _ in range(3)), cu_seqlens=(none, none), return_lse=True)
    assert out.shape == (0, 2, 4) and lse.shape == (2, 0)


def test_rows_that_see_nothing(small_tiles):
    """T = 17, S = 6: the first 11 rows are above the keys."""
    v = {name: x.requires_grad_() for name, x in make(2, 17, 6, 4, 2, 8).items()}
    out, lse = mk.attention(**v, return_lse=True)
    out.sum().backward()
    assert (out[:, :11] == 0).all() and (lse[:, :, :11] == -torch.inf).all() and lse[:, :, 11:].isfinite().all()
    assert (v["q"].grad[:, :11] == 0).all() and all(x.grad.isfinite().all() for x in v.values())
    empty = make(2, 3, 0, 4, 2, 8)
    leaf = empty["q"].requires_grad_()
    out = mk.attention(**empty, causal=False)
    out.sum().backward()
    assert (out == 0).all() and (leaf.grad == 0).all()


def test_views_of_a_fused_qkv():
    qkv = torch.randn(3, 9, 4 * 8 + 2 * 2 * 8)
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in qkv.split([32, 16, 16], -1))
    check({"q": q, "k": k, "v": v})
    transposed = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in make(2, 9, 9, 4, 2, 8).items()}
    check(transposed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 9, 9, 2, 2, 8), (1, 9, 12, 2, 1, 8)])
def test_large_scores_do_not_overflow(shape, causal):
    """Scores of up to 1e5, whose exponentials are far beyond fp32: nearly always one key has all the weight."""
    v = make(*shape)
    v["q"], v["k"] = v["q"] * 300, v["k"] * 300
    v = {name: x.requires_grad_() for name, x in v.items()}
    out, lse = mk.attention(**v, causal=causal, return_lse=True)
    truth, true_lse = attention_reference(**{n: x.double() for n, x in v.items()}, causal=causal, return_lse=True)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=0)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in v.values())


def test_products_in_bf16(monkeypatch, small_tiles):
    """What runs on processors with fast bf16 matmuls."""
    monkeypatch.setattr(kernel, "product_dtype", lambda dtype: dtype)
    for options in ({}, {"softcap": 2.0}, {"dropout_p": 0.3, "seed": SEED}, {"window": (3, 3), "causal": False}):
        check(make(2, 13, 17, 4, 2, 8, torch.bfloat16), **options)


@pytest.mark.parametrize("rows", [63, 64])
def test_fused_or_tiles_where_bf16_is_fast(monkeypatch, rows):
    monkeypatch.setattr(kernel, "product_dtype", lambda dtype: dtype)
    check(make(1, rows, rows, 2, 2, 8, torch.bfloat16))


@pytest.mark.parametrize("amx, avx512_bf16, amd, fast", [(1, 1, 0, 1), (0, 1, 1, 1), (0, 1, 0, 0), (0, 0, 1, 0)])
def test_which_processors_multiply_in_bf16(monkeypatch, tmp_path, amx, avx512_bf16, amd, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512_bf16))
    processors = tmp_path / "cpuinfo"
    processors.write_text("vendor_id : AuthenticAMD" if amd else "vendor_id : GenuineIntel")
    monkeypatch.setattr(kernel, "Path", lambda path: processors)
    wanted = torch.bfloat16 if fast else torch.float32
    assert kernel.product_dtype.__wrapped__(torch.bfloat16) == wanted
    assert kernel.product_dtype.__wrapped__(torch.float16) == torch.float32
    assert kernel.product_dtype.__wrapped__(torch.float64) == torch.float64


# --- the custom op ---


def op_arguments(v, offsets=(None, None), *, slopes=None, window=(4, 0), softcap=2.0, dropout_p=0.0):
    tensors = [x.requires_grad_() for x in v.values()]
    return (*tensors, *offsets, slopes, list(window), 0.3, softcap, dropout_p, [SEED, 1, 2], True, "torch")


@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.5}, {"window": (-1, -1), "softcap": 0.0}, {"slopes": torch.full((4,), 0.25)}]
)
def test_opcheck(options):
    library.opcheck(torch.ops.megakern.attention.default, op_arguments(make(2, 5, 7, 4, 2, 4), **options))


def test_opcheck_packed():
    offsets = tuple(torch.tensor(o, dtype=torch.int32) for o in ([0, 2, 5], [0, 4, 7]))
    packed = {name: x[0] for name, x in make(1, 5, 7, 4, 2, 4).items()}
    library.opcheck(torch.ops.megakern.attention.default, op_arguments(packed, offsets))


def test_compiles_in_one_graph():
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)

    def several(q, k, v):
        out, lse = mk.attention(q, k, v, window=(4, None), softcap=2.0, return_lse=True)
        out = out + mk.attention(out, k, v, dropout_p=0.2, seed=SEED, dropout_offset=(1, 2))
        packed = mk.attention(out[0], k[0], v[0], cu_seqlens=(offsets, offsets))
        return out + packed, lse

    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    assert_gradients_close(compiled, several, make(2, 9, 9, 4, 2, 8))


def test_compiles_once_for_all_seeds():
    counter = CompileCounterWithBackend("aot_eager")
    v = make(1, 5, 5, 2, 1, 4)
    compiled = torch.compile(lambda seed: mk.attention(**v, dropout_p=0.5, seed=seed), fullgraph=True, backend=counter)
    for seed in (SEED, SEED + 1, 3, 1 << 62):
        assert torch.equal(compiled(seed), mk.attention(**v, dropout_p=0.5, seed=seed))
    assert counter.frame_count <= 2


def test_repeats_are_bit_identical():
    results = []
    for _ in range(2):
        v = {name: x.requires_grad_() for name, x in make(2, 70, 70, 4, 2, 16, torch.bfloat16).items()}
        out, lse = mk.attention(**v, dropout_p=0.1, seed=SEED, deterministic=True, return_lse=True)
        out.float().square().sum().backward()
        results.append([out, lse, *(x.grad for x in v.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_through_lse():
    v = {name: x.requires_grad_() for name, x in make(1, 3, 3, 1, 1, 4).items()}
    out, lse = mk.attention(**v, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_same_precision_error_is_that_of_fp32_products():
    """bf16 in, fp32 inside: closer to the truth than plain bf16 PyTorch by far."""
    v = make(1, 64, 64, 2, 2, 64, torch.bfloat16)
    v["q"] = v["q"] * 4
    truth = attention_reference(**{name: x.double() for name, x in v.items()})
    assert_close_to_ref(mk.attention(**v), truth, truth.bfloat16(), floor=1e-3)


def test_explains_itself():
    explanation = mk.explain(mk.attention, **make(1, 2, 3, 4, 2, 8), softcap=3.0, deterministic=True)
    assert explanation.chosen == "torch" and explanation.problem.sizes["Hkv"] == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.ones(4, 2, 8)}, ValueError, r"q must have shape \(B, T, H, D\), got \(4, 2, 8\)"),
        ({"q": torch.ones(1, 4, 4, 8).int()}, TypeError, "q must be float16, bfloat16, float32 or float64"),
        ({"k": torch.ones(1, 5, 2, 8).half()}, TypeError, "k must have the dtype of q"),
        ({"v": torch.ones(1, 5, 2, 8, device="meta")}, ValueError, "v must be on the device of q"),
        ({"k": torch.ones(1, 5, 2, 4)}, ValueError, "q and k must have the same head dim, at least 1, got 8 and 4"),
        ({"v": torch.ones(1, 4, 2, 8)}, ValueError, r"v must have shape of k = \(1, 5, 2, 8\), got \(1, 4, 2, 8\)"),
        (dict.fromkeys("kv", torch.ones(1, 5, 3, 8)), ValueError, "Hkv = 3, must divide the heads of q, H = 4"),
        (dict.fromkeys("kv", torch.ones(2, 5, 2, 8)), ValueError, "q and k must have the same batch size, got 1 and 2"),
        ({"window": (-1, 2)}, ValueError, r"window must be \(left, right\), each None or at least 0, got \(-1, 2\)"),
        ({"window": (1, 2, 3)}, ValueError, r"window must be \(left, right\)"),
        ({"window": 4}, ValueError, r"window must be \(left, right\), each None or at least 0, got 4"),
        ({"v": None}, ValueError, r"v must have shape \(B, T, H, D\), got NoneType"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0"),
        ({"softcap": float("nan")}, ValueError, "softcap must be at least 0"),
        (
            {"alibi_slopes": torch.ones(3)},
            ValueError,
            r"alibi_slopes must be float32 of shape \(H,\) = \(4,\) or \(B, H\) = \(1, 4\), got torch.float32 \(3,\)",
        ),
        ({"alibi_slopes": torch.ones(4).double()}, ValueError, r"alibi_slopes must be float32 .* got torch.float64"),
        ({"alibi_slopes": torch.ones(4, device="meta")}, ValueError, "alibi_slopes must be on the device of q"),
        (
            {"alibi_slopes": torch.ones(4).requires_grad_()},
            ValueError,
            r"get no gradient; pass alibi_slopes.detach\(\)",
        ),
        ({"dropout_p": 1.0, "seed": 1}, ValueError, "dropout_p must be at least 0 and less than 1, got 1.0"),
        ({"dropout_p": 0.5}, ValueError, "dropout_p is 0.5, so a seed is needed"),
        ({"dropout_p": 0.5, "seed": -3}, ValueError, "seed must be at least 0"),
        ({"dropout_p": 0.5, "seed": 0.5}, TypeError, "seed must be a Python int, got float"),
        (
            {"dropout_offset": (0, -1)},
            ValueError,
            r"dropout_offset must be \(first sample, first head\), both at least 0",
        ),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' was asked for, but"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {**make(1, 4, 5, 4, 2, 8), **change}
    with pytest.raises(error, match=message):
        mk.attention(**arguments)


def offsets(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype)


@pytest.mark.parametrize(
    "cu_seqlens, error, message",
    [
        (offsets(0, 5), TypeError, r"cu_seqlens must be a pair \(q_offsets, k_offsets\) of tensors"),
        ((offsets(0, 5, dtype=torch.int64), offsets(0, 5)), ValueError, "q_offsets must be int32 .* got torch.int64"),
        ((offsets(0, 5), offsets(0, 5)[None]), ValueError, r"k_offsets must be int32 of shape .* got .* \(1, 2\)"),
        ((offsets(), offsets()), ValueError, r"q_offsets must be int32 of shape \(sequences \+ 1,\)"),
        ((offsets(0, 5).to("meta"), offsets(0, 5)), ValueError, "q_offsets must be on the device of q"),
        (
            (offsets(0, 4), offsets(0, 5)),
            ValueError,
            r"q_offsets must rise from 0 to the number of rows, 5, got \[0, 4",
        ),
        (
            (offsets(0, 5), offsets(1, 5)),
            ValueError,
            r"k_offsets must rise from 0 to the number of rows, 5, got \[1, 5",
        ),
        ((offsets(0, 5), offsets(0, 3, 2, 5)), ValueError, "k_offsets must rise from 0"),
        ((offsets(0, 5), offsets(0, 3, 5)), ValueError, "q_offsets and k_offsets must be of one length, got 2 and 3"),
    ],
)
def test_wrong_offsets_are_named(cu_seqlens, error, message):
    packed = {name: x[0] for name, x in make(1, 5, 5, 4, 2, 8).items()}
    with pytest.raises(error, match=message):
        mk.attention(**packed, cu_seqlens=cu_seqlens)


def test_packed_needs_three_dims():
    with pytest.raises(ValueError, match=r"q must have shape \(T, H, D\) with cu_seqlens, got \(1, 5, 4, 8\)"):
        mk.attention(**make(1, 5, 5, 4, 2, 8), cu_seqlens=(offsets(0, 5), offsets(0, 5)))


# --- sinks ---

SINKS = torch.tensor([1.5, -2.0, 30.0, -40.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": (9, 3), "causal": False, "softcap": 1.5},
                {"dropout_p": 0.4, "seed": 3}, {"alibi_slopes": torch.tensor([0.5, 0.0, -0.1, 0.25])}]
)  # fmt: skip
def test_sinks_have_a_share_of_the_probability(options, dtype, with_and_without_cpu_kernels):
    for T, S in ((20, 30), (30, 20), (1, 17)):
        inputs = make(2, T, S, 4, 2, 8, dtype) | {"sinks": SINKS.to(dtype)}
        assert_gradients_close(
            functools.partial(mk.attention, **options), functools.partial(attention_reference, **options), inputs
        )


def test_sinks_are_those_of_the_formula():
    """Independent of the reference: a key without value whose score does not depend on the query, by hand."""
    v = make(1, 5, 5, 2, 1, 4, torch.float64)
    out, lse = mk.attention(**v, sinks=SINKS[:2].double(), return_lse=True)
    for h in range(2):
        for t in range(5):
            scores = (v["q"][0, t, h] @ v["k"][0, : t + 1, 0].T) / 2
            weights = torch.exp(scores) / (torch.exp(scores).sum() + torch.exp(SINKS[h].double()))
            torch.testing.assert_close(out[0, t, h], weights @ v["v"][0, : t + 1, 0])
            torch.testing.assert_close(lse[0, h, t], torch.log(torch.exp(scores).sum() + torch.exp(SINKS[h].double())))


def test_sinks_that_do_not_fit_are_refused():
    v = make(1, 3, 3, 4, 2, 8)
    with pytest.raises(
        ValueError, match=r"attention: sinks must have shape \(H,\) = \(4,\), got \(2,\); a score for each"
    ):
        mk.attention(**v, sinks=SINKS[:2])
    with pytest.raises(TypeError, match=r"attention: sinks must be float32 or have the dtype of q, torch.float32, got"):
        mk.attention(**v, sinks=SINKS.half())
