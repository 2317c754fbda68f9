"""The C++ attention for sm_90a against float64: masks, groups, ragged tiles. In the emulator, or on a GPU.

Each consumer owns 64 queries of a tile of 128; keys come in tiles of 128, from head dim 136 on 112, from 200 on 80.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import attention as launchers
from megakern.ops.attention import attention
from megakern.ops.attention_reference import attention_reference
from tests.closeness import assert_close_to_ref, assert_gradients_close
from tests.kernels.inputs import draw

OP = "attention"
SEED = 0x5EED_1234_5678
pytestmark = pytest.mark.only("cuda", "simt")


@pytest.fixture(autouse=True)
def not_decoding(monkeypatch):
    """Few queries too: their own kernel has tests in test_paged_attention.py."""
    monkeypatch.setattr(launchers, "decodes", lambda *sizes: False)


def make(B, T, S, H, Hkv, D, dtype, device):
    shapes = {"q": (B, T, H, D), "k": (B, S, Hkv, D), "v": (B, S, Hkv, D)}
    return {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def check(inputs, backend, **options):
    """out and lse; where a row sees no key both lse are -inf."""
    options["return_lse"] = True
    out, lse = attention(**inputs, backend=backend, **options)
    same, _ = attention_reference(**inputs, **options)
    wide, wide_lse = attention_reference(**{name: x.double() for name, x in inputs.items()}, **options)
    assert_close_to_ref(out, wide, same)
    assert torch.equal(lse.isinf(), wide_lse.isinf())
    seen = ~wide_lse.isinf()
    torch.testing.assert_close(lse[seen].double(), wide_lse[seen], rtol=1e-5, atol=1e-5)
    return out, lse


# One query, tiles of 64 and 128 and their neighbours, primes, T < S and T > S (rows that see nothing), several samples.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 64), (1, 128, 128, 1, 1, 128), (2, 7, 129, 4, 2, 64), (1, 130, 67, 2, 2, 64),
     (1, 113, 203, 3, 1, 128), (1, 257, 255, 2, 1, 64)],
)  # fmt: skip
def test_causal_and_full(shape, dtype, backend, device):
    check(make(*shape, dtype, device), backend)
    check(make(*shape, dtype, device), backend, causal=False)


@pytest.mark.parametrize("window", [(0, 0), (30, 10), (100, None), (None, 5), (300, 0)])
def test_windows(window, backend, device):
    check(make(1, 150, 290, 2, 1, 64, torch.bfloat16, device), backend, causal=False, window=window)


# Multiples of 8 below, at and above the sizes that the kernel is compiled for; tiles of keys and one more.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "D, S", [(8, 129), (72, 128), (96, 129), (104, 67), (136, 113), (160, 225), (192, 112), (200, 81), (256, 161)]
)
def test_head_dims(D, S, dtype, backend, device):
    check(make(1, 70, S, 2, 1, D, dtype, device), backend)


SLOPES = torch.tensor([[0.5, 0.25], [-0.1, 0.3]])
FEATURES = [
    {"scale": -0.2},
    {"scale": 0.0},
    {"softcap": 0.8, "scale": 0.7},
    {"alibi_slopes": SLOPES[0]},
    {"alibi_slopes": SLOPES, "window": (60, 12), "causal": False, "softcap": 1.5},
    {"dropout_p": 0.3, "seed": SEED, "dropout_offset": (5, 7)},
    {"dropout_p": 0.5, "seed": 3, "alibi_slopes": SLOPES, "softcap": 2.0, "window": (None, 70), "causal": False},
]


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("options", FEATURES)
def test_features(options, backend, device):
    check(make(2, 140, 180, 2, 1, 64, torch.bfloat16, device), backend, **on(device, options))


@pytest.mark.parametrize("D", [96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_every_head_dim(D, dtype, backend, device):
    check(make(2, 65, 130, 2, 2, D, dtype, device), backend, **on(device, FEATURES[-1]))


# Sequences of 140, 0, 1, 133 and 5 queries with 150, 3, 0, 116 and 5 keys; the third sees nothing.
ENDS = (0, 140, 140, 141, 274, 279), (0, 150, 153, 153, 269, 274)


def packed_case(device, D=64):
    inputs = {name: x[0] for name, x in make(1, ENDS[0][-1], ENDS[1][-1], 4, 2, D, torch.bfloat16, device).items()}
    return inputs, tuple(torch.tensor(ends, dtype=torch.int32, device=device) for ends in ENDS)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": (50, 1), "causal": False, "softcap": 1.0}, FEATURES[-2]]
)
def test_packed(options, backend, device):
    inputs, both = packed_case(device)
    out, lse = check(inputs, backend, cu_seqlens=both, **options)
    assert out[140].abs().max() == 0 and (lse[:, 140] == -torch.inf).all()


def test_packed_is_each_sequence_alone(backend, device):
    """To the bit, with slopes of its own; and a sequence of NaN spoils no other."""
    inputs, both = packed_case(device, D=96)
    slopes = draw(5, 4, device=device, seed=7, scale=0.1)
    together, lse = attention(**inputs, cu_seqlens=both, alibi_slopes=slopes, return_lse=True, backend=backend)
    for i in (0, 3, 4):
        (q0, q1), (k0, k1) = (ends[i : i + 2] for ends in ENDS)
        q, k, v = inputs["q"][None, q0:q1], inputs["k"][None, k0:k1], inputs["v"][None, k0:k1]
        alone, its_lse = attention(q, k, v, alibi_slopes=slopes[i], return_lse=True, backend=backend)
        assert torch.equal(together[q0:q1], alone[0]) and torch.equal(lse[:, q0:q1], its_lse[0])
    inputs["q"][141:274] = inputs["k"][153:269] = inputs["v"][153:269] = torch.nan
    spoilt = attention(**inputs, cu_seqlens=both, alibi_slopes=slopes, backend=backend)
    assert spoilt[141:274].isnan().all()
    assert torch.equal(spoilt[:141], together[:141]) and torch.equal(spoilt[274:], together[274:])


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_any_number_of_blocks(blocks, backend, device, monkeypatch):
    """Each has all its tiles in turn, here up to 12, of which some see no key; the bits do not depend on it."""
    inputs = make(2, 300, 140, 2, 1, 64, torch.bfloat16, device)
    whole = check(inputs, backend)
    packed, both = packed_case(device)
    packed_whole = attention(**packed, cu_seqlens=both, backend=backend)
    monkeypatch.setattr(launchers, "multiprocessors", lambda device: blocks)
    for one, other in zip(whole, check(inputs, backend), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(packed_whole, attention(**packed, cu_seqlens=both, backend=backend))


OTHERS = [(D, tile) for D, tiles in launchers.TILES.items() for tile in tiles[1:]]


@pytest.mark.parametrize("D, tile", OTHERS, ids=str)
def test_other_tiles(D, tile, backend, device, monkeypatch):
    """Several tiles of queries and keys, one block for two; they refuse what they have no code for."""
    monkeypatch.setattr(launchers, "tile_for", lambda *problem: tile)
    monkeypatch.setattr(launchers, "multiprocessors", lambda device: 2)
    inputs = make(1, 400, 390, 2, 1, D, torch.bfloat16, device)
    check(inputs, backend)
    check(inputs, backend, causal=False, window=(100, 20))
    check({name: x[:, :50] for name, x in inputs.items()}, backend, causal=False)
    with pytest.raises(ValueError, match="this tile is for a scale above 0 without cap"):
        attention(**inputs, softcap=1.0, backend=backend)


def test_the_tile_of_a_problem():
    """Three consumers where sequences are long and scores plain; 128 queries elsewhere, and at all other head dims."""
    assert launchers.tile_for(64, 2048, True).queries == launchers.tile_for(40, 5000, True).queries == 192
    others = [(64, 2047, True), (64, 2048, False), (72, 9000, True), (128, 9000, True), (256, 9000, False)]
    assert {launchers.tile_for(*problem).queries for problem in others} == {128}


def test_a_tile_that_there_is_not(backend, device, monkeypatch):
    monkeypatch.setattr(launchers, "tile_for", lambda *problem: launchers.Tile(64, 40))
    with pytest.raises(ValueError, match="there is no tile of 64 queries and 40 keys for D 72"):
        attention(**make(1, 8, 8, 1, 1, 72, torch.bfloat16, device), backend=backend)


@pytest.mark.parametrize("blocks", [1, 3, 8, 132])
def test_heads_in_sections_of_any_size(blocks, backend, device, monkeypatch):
    """Rounds of blocks that end with a section, or not; a last section of fewer heads."""
    inputs = make(2, 140, 140, 6, 3, 64, torch.bfloat16, device)
    whole = check(inputs, backend)
    monkeypatch.setattr(launchers, "multiprocessors", lambda device: blocks)
    for heads in (2, 8):  # of 12
        monkeypatch.setattr(launchers, "heads_at_a_time", lambda *sizes, heads=heads: heads)
        for one, other in zip(whole, check(inputs, backend), strict=True):
            assert torch.equal(one, other)


@pytest.mark.only("simt")
@pytest.mark.parametrize("schedule", ["reverse", "random", "pct"])
def test_the_order_of_threads_does_not_matter(schedule, backend, device):
    from megakern import _simt

    inputs = make(1, 140, 300, 1, 1, 64, torch.bfloat16, device)
    first = check(inputs, backend)
    _simt.set_schedule(schedule)
    try:
        for one, other in zip(first, check(inputs, backend), strict=True):
            assert torch.equal(one, other)
    finally:
        _simt.set_schedule("forward")


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_that_rise_from_tile_to_tile(causal, way, backend, device):
    """By less and by more than a row's base bears before it follows, and by more than fp32 could: from the last keys,
    where a kernel begins, to the first, or the other way; every second row less than its neighbours.
    PyTorch in bf16 rounds scores of 800 to multiples of 4: no measure for this."""
    inputs = make(1, 150, 700, 2, 1, 64, torch.bfloat16, device)
    level = torch.tensor([0, 3, 9, 40, 400, 800], device=device).repeat_interleave(128)[:700].flip(0)
    inputs["k"][..., 0] = (level if way == 1 else 800 - level).bfloat16()[:, None]
    inputs["q"][..., 0] = torch.tensor([8.0, 1.0], device=device).repeat(75)[:, None].bfloat16()
    out, lse = attention(**inputs, causal=causal, return_lse=True, backend=backend)
    wide, wide_lse = attention_reference(
        **{name: x.double() for name, x in inputs.items()}, causal=causal, return_lse=True
    )
    torch.testing.assert_close(out.double(), wide, rtol=0.01, atol=0.01)
    torch.testing.assert_close(lse.double(), wide_lse, rtol=1e-5, atol=1e-5)


def test_strided_views_and_nan_around_them(backend, device):
    """q, k, v out of one projection, as layers have them, with NaN in the columns between."""
    field = torch.full((2, 90, 5, 3 * 64 + 16), float("nan"), dtype=torch.bfloat16, device=device)
    views = [field[..., at : at + 64] for at in (0, 64, 128)]
    for i, view in enumerate(views):
        view.copy_(draw(*view.shape, dtype=torch.bfloat16, device=device, seed=i))
    q, k, v = views[0], views[1][:, :, :1], views[2][:, :, :1]
    plain = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    assert torch.equal(attention(q, k, v, backend=backend), plain)
    odd = torch.empty(2, 90, 5, 67, dtype=torch.bfloat16, device=device)[..., 1:65].copy_(q)
    assert torch.equal(attention(odd, k, v, backend=backend), plain)


def test_nan_in_keys_that_nobody_sees(backend, device):
    inputs = make(1, 50, 200, 1, 1, 64, torch.bfloat16, device)
    expected = check(inputs, backend, causal=False, window=(20, 0))
    inputs["k"][:, :100] = 1000.0  # finite: a masked product of NaN is NaN on every backend's v
    inputs["v"][:, :100] = 1000.0
    found = attention(**inputs, causal=False, window=(20, 0), return_lse=True, backend=backend)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_gradients_and_repeats(backend, device):
    inputs = make(1, 70, 90, 2, 1, 64, torch.bfloat16, device)
    assert_gradients_close(partial(attention, backend=backend), attention_reference, inputs)
    first, second = (attention(**inputs, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("D, S, reason", [(84, 8, "multiples of 8 up to 256, got 84"), (264, 8, "up to 256, got 264"),
                                          (64, 0, "at least one query and one key")])  # fmt: skip
def test_what_it_refuses(D, S, reason, backend, device):
    inputs = make(1, 8, S, 1, 1, D, torch.bfloat16, device)
    with pytest.raises(ValueError, match=reason):
        attention(**inputs, backend=backend)
    assert reason in mk.explain("attention", **inputs).reasons[backend]


def test_no_sample(backend, device):
    inputs = make(0, 8, 8, 2, 1, 64, torch.bfloat16, device)
    out, lse = attention(**inputs, return_lse=True, backend=backend)
    assert out.shape == (0, 8, 2, 64) and lse.shape == (0, 2, 8)
