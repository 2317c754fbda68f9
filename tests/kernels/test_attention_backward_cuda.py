"""The C++ gradients of attention for sm_90a against float64, all options. In the emulator, or on a GPU.

A block has 128 keys, each consumer 64 of them; queries come in tiles of 128, from head dim 72 on 64, or 80 for long
full masks. From 136 on a block has 64 keys, each consumer half of the columns.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import attention_backward as launchers
from megakern.kernels.cuda.module import call
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from tests.closeness import assert_gradients_close
from tests.kernels.inputs import draw
from tests.kernels.test_attention_cuda import ENDS, FEATURES, make, on, packed_case

OP = "attention"
pytestmark = pytest.mark.only("cuda", "simt")


def check(inputs, backend, deterministic=False, **options):
    ours = partial(attention, backend=backend, deterministic=deterministic, **options)
    assert_gradients_close(ours, partial(attention_reference, **options), inputs)


def gradients(inputs, backend, upstream=None, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = attention(**leaves, backend=backend, **options)
    upstream = draw(*out.shape, dtype=out.dtype, device=out.device, seed=9) if upstream is None else upstream
    return torch.autograd.grad(out, list(leaves.values()), upstream)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# One query, tiles of 64 and 128 and their neighbours, primes, T < S and T > S (rows that see nothing), several samples.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 7, 1, 1, 64), (1, 128, 128, 1, 1, 128), (2, 7, 129, 4, 2, 64), (1, 129, 67, 2, 2, 128),
     (1, 113, 203, 6, 2, 128), (1, 257, 255, 2, 1, 64)],
)  # fmt: skip
def test_causal_and_full(shape, dtype, backend, device):
    check(make(*shape, dtype, device), backend)
    check(make(*shape, dtype, device), backend, causal=False)


@pytest.fixture
def tiles_of_80(monkeypatch):
    """For whatever they have code for."""
    first = launchers.tile_for

    def choose(D, T, plain, full):
        return launchers.TILES[128][1] if 64 < D <= 128 and plain else first(D, T, plain, full)

    monkeypatch.setattr(launchers, "tile_for", choose)


# Tiles of 80 and their neighbours, the last of them with one row, with 32 and with 79.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 7, 1, 1, 128), (1, 80, 128, 1, 1, 72), (2, 79, 129, 4, 2, 128), (1, 81, 64, 2, 2, 96),
     (2, 112, 203, 3, 3, 120), (1, 161, 65, 6, 2, 128)],
)  # fmt: skip
def test_tiles_of_80_queries(shape, dtype, backend, device, tiles_of_80):
    # Of 112 queries that see 100 keys to each side the last ones of a tile alone do not see all of a consumer's keys.
    window = (30, 10) if dtype is torch.bfloat16 else (100, 100)
    for mask in ({"causal": False}, {"scale": -0.2}, {"causal": False, "window": window}):
        check(make(*shape, dtype, device), backend, deterministic=dtype is torch.bfloat16, **mask)


def test_tiles_of_80_queries_for_packed_sequences(backend, device, tiles_of_80):
    inputs, both = packed_case(device, 128)
    for mask in ({"causal": False}, {}):
        check(inputs, backend, cu_seqlens=both, deterministic=True, **mask)


@pytest.mark.parametrize("D, rows", [(64, 128), (128, 64), (128, 80), (200, 64)])
def test_dq_added_from_registers(D, rows, backend, device, monkeypatch, request):
    """Dense and packed; where the order of additions is fixed it goes its usual way, to the bit."""
    if rows == 80:
        request.getfixturevalue("tiles_of_80")
    inputs = make(2, 170, 203, 4, 2, D, torch.bfloat16, device)
    fixed = gradients(inputs, backend, causal=False, deterministic=True)
    monkeypatch.setattr(launchers, "FROM_REGISTERS", True)
    check(inputs, backend, causal=False)
    packed, both = packed_case(device, D)
    check(packed, backend, cu_seqlens=both)
    assert same(fixed, gradients(inputs, backend, causal=False, deterministic=True))


def test_the_tile_of_a_problem(backend, device, monkeypatch):
    assert [launchers.tile_for(D, 1024, True, True).queries for D in (64, 72, 128, 136)] == [128, 80, 80, 64]
    others = [(128, 1023, True, True), (128, 5000, False, True), (128, 5000, True, False), (200, 5000, True, True)]
    assert {launchers.tile_for(*problem).queries for problem in others} == {64}
    monkeypatch.setattr(launchers, "LONG", 8)  # the launcher and what explains it ask the same
    inputs, asked = make(1, 8, 8, 1, 1, 128, torch.bfloat16, device), []
    choose = launchers.tile_for
    monkeypatch.setattr(launchers, "tile_for", lambda *problem: asked.append(choose(*problem)) or asked[-1])
    for options, queries in [
        ({}, 64), ({"causal": False}, 80), ({"causal": False, "window": (None, None)}, 80),
        ({"causal": False, "window": (None, 3)}, 64), ({"causal": False, "softcap": 2.0}, 64),
        ({"causal": False, "alibi_slopes": torch.ones(1, device=device)}, 64),
        ({"causal": False, "dropout_p": 0.1, "seed": 1}, 64),
    ]:  # fmt: skip
        gradients(inputs, backend, **options)
        said = mk.explain("attention", **inputs, backend=backend, **options).reasons[backend]
        assert [tile.queries for tile in asked] == [queries, queries] and f"{asked[0]}, dk" in said
        asked.clear()
    ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
    flat = {name: x[0] for name, x in inputs.items()}
    gradients(flat, backend, causal=False, cu_seqlens=(ends, ends))
    assert [tile.queries for tile in asked] == [64]


@pytest.mark.parametrize("window", [(0, 1), (30, 10), (100, None), (None, 5), (300, 0)])
@pytest.mark.parametrize("D", [64, 128])
def test_windows(window, D, backend, device):
    check(make(1, 150, 290, 2, 1, D, torch.bfloat16, device), backend, causal=False, window=window, deterministic=True)


@pytest.mark.parametrize("D, S", [(8, 129), (40, 63), (72, 128), (96, 65), (120, 67), (136, 64), (192, 65), (256, 200)])
def test_head_dims(D, S, backend, device):
    inputs = make(1, 70, S, 2, 1, D, torch.bfloat16, device)
    check(inputs, backend)
    check(inputs, backend, causal=False, window=(20, 30), deterministic=True)


@pytest.mark.parametrize("options", FEATURES)
@pytest.mark.parametrize("D", [64, 128])
def test_features(options, D, backend, device):
    check(make(2, 140, 180, 2, 1, D, torch.bfloat16, device), backend, **on(device, options))


def test_features_in_fp16(backend, device):
    for D in (64, 128, 256):
        check(make(2, 65, 130, 2, 2, D, torch.float16, device), backend, **on(device, FEATURES[-1]))


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": (50, 1), "causal": False, "softcap": 1.0}, FEATURES[-2]]
)
def test_packed(options, backend, device):
    inputs, both = packed_case(device)
    check(inputs, backend, cu_seqlens=both, deterministic=True, **options)


@pytest.mark.parametrize("D, rows", [(64, 128), (96, 64), (112, 80), (200, 64)])
def test_packed_is_each_sequence_alone(D, rows, backend, device, request):
    """To the bit, with slopes of its own; and a sequence of NaN spoils no other."""
    inputs, both = packed_case(device, D)
    slopes = None if rows == 80 else draw(5, 4, device=device, seed=7, scale=0.1)  # tiles of 80 have none
    if rows == 80:
        request.getfixturevalue("tiles_of_80")
    upstream = draw(ENDS[0][-1], 4, D, dtype=torch.bfloat16, device=device, seed=5)
    find = partial(gradients, backend=backend, deterministic=True)
    together = partial(find, inputs, upstream=upstream, cu_seqlens=both, alibi_slopes=slopes)
    clean = together()
    for i in (0, 3, 4):
        (q0, q1), (k0, k1) = (ends[i : i + 2] for ends in ENDS)
        parts = {"q": inputs["q"][None, q0:q1], "k": inputs["k"][None, k0:k1], "v": inputs["v"][None, k0:k1]}
        own = None if slopes is None else slopes[i]
        dq, dk, dv = find(parts, upstream=upstream[None, q0:q1], alibi_slopes=own)
        assert same((dq[0], dk[0], dv[0]), (clean[0][q0:q1], clean[1][k0:k1], clean[2][k0:k1]))
    assert all((x[150:153] == 0).all() for x in clean[1:]), "keys of a sequence without queries"
    inputs["q"][141:274] = inputs["k"][153:269] = inputs["v"][153:269] = upstream[141:274] = torch.nan
    for x, good, (first, last) in zip(together(), clean, ((141, 274), (153, 269), (153, 269)), strict=True):
        assert torch.equal(x[:first], good[:first]) and torch.equal(x[last:], good[last:])
        assert x[first:last].isnan().all()


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"causal": False, "window": (40, 250)}])
def test_rows_and_keys_that_see_nothing_have_no_gradient(options, backend, device):
    dq, dk, dv = gradients(make(1, 50, 6, 2, 1, 64, torch.bfloat16, device), backend)
    assert (dq[:, :44] == 0).all() and all(x.isfinite().all() for x in (dq, dk, dv))
    inputs = make(1, 4, 300, 2, 1, 128, torch.bfloat16, device)
    dq, dk, dv = gradients(inputs, backend, causal=False, window=(3, 0))
    assert (dk[:, :292] == 0).all() and (dv[:, :292] == 0).all() and dk[:, 296:].abs().min() > 0


SCHEDULES = ["reverse", "random:1", "pct:1"]


@pytest.mark.only("simt")
@pytest.mark.parametrize("options", [{"causal": False}, {}, {"window": (150, 70), "causal": False}])
@pytest.mark.parametrize("D, rows", [(64, 128), (128, 64), (128, 80), (160, 64)])
def test_deterministic_whatever_the_order(D, rows, options, backend, device, request):
    """Up to four blocks add to each dq, under schedules that start them in other orders."""
    from megakern import _simt

    if rows == 80:
        request.getfixturevalue("tiles_of_80")
    inputs = make(1, 140, 500 if D < 136 else 250, 1, 1, D, torch.float16, device)

    def under(schedule, **more):
        _simt.set_schedule(schedule)
        return gradients(inputs, backend, **options, **more)

    first = under("forward", deterministic=True)
    assert all(same(first, under(schedule, deterministic=True)) for schedule in SCHEDULES)
    any_order = [under(schedule) for schedule in ("forward", "reverse")]
    if options == {"causal": False}:  # four blocks for each query
        assert not torch.equal(any_order[0][0], any_order[1][0])
    assert all(torch.equal(x[i], first[i]) for x in any_order for i in (1, 2)), "dk and dv are sums of one block each"


@pytest.mark.parametrize("options", [{}, {"window": (40, 3), "causal": False}])
def test_deterministic_repeats(options, backend, device):
    inputs = make(2, 300, 420, 4, 2, 64, torch.bfloat16, device)
    first = gradients(inputs, backend, deterministic=True, **options)
    assert same(first, gradients(inputs, backend, deterministic=True, **options))


def test_heads_in_sections_of_any_size(backend, device, monkeypatch):
    inputs = make(2, 140, 140, 6, 3, 64, torch.bfloat16, device)
    whole = gradients(inputs, backend, deterministic=True)
    monkeypatch.setattr(launchers, "QUERIES_IN_CACHE", 1)  # one head of keys at a time
    assert same(whole, gradients(inputs, backend, deterministic=True))


def test_strided_views_and_nan_around_them(backend, device):
    """q, k, v out of one projection, with NaN in the columns between; a gradient that is one number."""
    field = torch.full((2, 90, 5, 3 * 64 + 16), float("nan"), dtype=torch.bfloat16, device=device)
    views = [field[..., at : at + 64] for at in (0, 64, 128)]
    for i, view in enumerate(views):
        view.copy_(draw(*view.shape, dtype=torch.bfloat16, device=device, seed=i))
    inputs = {"q": views[0], "k": views[1][:, :, :1], "v": views[2][:, :, :1]}
    dense = {name: x.contiguous() for name, x in inputs.items()}
    find = partial(gradients, backend=backend, deterministic=True)
    assert same(find(inputs), find(dense))
    one = torch.ones((), dtype=torch.bfloat16, device=device).expand(2, 90, 5, 64)
    assert same(find(dense, upstream=one), find(dense, upstream=one.contiguous()))


def test_large_scores_do_not_overflow(backend, device):
    inputs = make(1, 140, 140, 2, 1, 64, torch.bfloat16, device)
    inputs["q"], inputs["k"] = inputs["q"] * 300, inputs["k"] * 300
    assert all(x.isfinite().all() for x in gradients(inputs, backend))


def test_nothing_to_do(backend, device):
    dq, dk, dv = gradients(make(0, 8, 8, 2, 1, 64, torch.bfloat16, device), backend)
    assert dq.shape == (0, 8, 2, 64) and dk.shape == dv.shape == (0, 8, 1, 64)


@pytest.mark.parametrize("D, tile", [(64, "128 keys x 128"), (72, "128 keys x 64"), (136, "64 keys x 64")])
def test_explains_itself(D, tile, backend, device):
    inputs = make(1, 8, 8, 1, 1, D, torch.bfloat16, device)
    for deterministic, order in ((False, "in any order"), (True, "in the order of the keys")):
        said = mk.explain("attention", **inputs, deterministic=deterministic, backend=backend).reasons[backend]
        assert f"backward with TMA and wgmma, {tile} queries" in said and said.endswith(order)


def test_arguments_are_checked(backend, device):
    """By C++, before a launch. Of what the launcher passes, one thing at a time is wrong."""
    inputs = {name: x.contiguous() for name, x in make(1, 8, 8, 1, 1, 64, torch.bfloat16, device).items()}
    like = {name: torch.empty_like(inputs["q"]) for name in ("dout", "out", "dq", "dk", "dv")}
    scratch = [torch.empty(1 << 14, device=device) for _ in range(3)]
    sizes, row = {"B": 1, "T": 8, "S": 8, "H": 1, "Hkv": 1, "D": 64}, [512, 64, 64]

    def launch(
        dq=None,
        lines=1,
        dtype=1,
        strides=row,
        rows=128,
        scale=0.125,
        offsets=0,
        cap=0.0,
        turns=0,
        direct=False,
        **changed,
    ):
        tensors = [*inputs.values(), like["dout"], like["out"], scratch[0]]
        outputs = [like["dq"] if dq is None else dq, like["dk"], like["dv"], *scratch[1:]]
        call("attention_backward", inputs["q"], *(x.data_ptr() for x in (*tensors, *outputs)), 0, turns, lines, offsets,
             0, 0, dtype, *{**sizes, **changed}.values(), *row * 4, *strides, -1, 0, 1, rows, direct, scale, 0, 0, cap,
             0, 0, 0, -(1 << 31), 1.0)  # fmt: skip

    launch()
    for wrong, message in [
        ({"lines": 2}, "scratch memory must have 1 lines, got 2"),
        ({"dtype": 0}, "dtype must be code 1 .* got 0"),
        ({"D": 264}, "multiple of 8 up to 256, got 264"),
        ({"H": 3, "Hkv": 2}, "Hkv must divide H"),
        ({"strides": [512, 4, 64]}, "rows of out must start on multiples of 16 bytes"),
        ({"strides": [512, 0, 64]}, "strides of out must be above 0"),
        ({"rows": 64}, "there is no tile of 64 queries for D 64"),
        ({"rows": 80, "D": 72, "T": 7, "cap": 1.0}, "tiles of 80 queries are for scores without cap"),
        ({"turns": inputs["v"].data_ptr(), "direct": True}, "turns are for sums added by way of shared memory"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"offsets": inputs["q"].data_ptr()}, "q_offsets and k_offsets come in pairs"),
        ({"dq": like["dk"]}, "is written and must not overlap"),
    ]:
        with pytest.raises(ValueError, match=message):
            launch(**wrong)
