"""Blocks of the C++ attention in clusters of two, which fetch keys and values once for both: two query heads of one
head of keys, or two tiles of queries. Against float64, and the bits are those of single blocks.
"""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import attention as launchers
from megakern.kernels.cuda.attention import Pairs, Tile, pairs_for
from megakern.ops.attention import attention
from tests.kernels.test_attention_cuda import FEATURES, check, make, on, packed_case
from tests.kernels.test_attention_cuda import not_decoding as not_decoding  # for each test here too

OP = "attention"
pytestmark = pytest.mark.only("cuda", "simt")


@pytest.fixture
def pairs(monkeypatch):
    """`pairs(kind, blocks)`: from now on these, on so many multiprocessors."""

    def choose(kind: Pairs, blocks: int = 4) -> None:
        monkeypatch.setattr(launchers, "pairs_for", lambda *problem: kind)
        monkeypatch.setattr(launchers, "multiprocessors", lambda device: blocks)

    return choose


def both_ways(pairs, kind, inputs, backend, blocks=4, **options):
    """Paired against float64, and against single blocks to the bit. -> out, lse"""
    pairs(Pairs.NONE)
    single = attention(**inputs, backend=backend, return_lse=True, **options)
    pairs(kind, blocks)
    paired = check(inputs, backend, **options)
    for one, other in zip(paired, single, strict=True):
        assert torch.equal(one, other)
    return paired


# One to four slabs of 64 columns; groups of 2 and of 8; ragged tiles of queries; keys in several tiles or in one.
@pytest.mark.parametrize(
    "shape, options",
    [((2, 130, 290, 4, 2, 64), {}), ((1, 7, 129, 8, 1, 128), {}), ((1, 257, 255, 2, 1, 128), {"causal": False}),
     ((1, 150, 290, 2, 1, 128), {"causal": False, "window": (60, 10)}), ((1, 130, 230, 2, 1, 192), {}),
     ((1, 129, 200, 2, 1, 256), {}), ((1, 290, 130, 4, 1, 96), {})],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_heads(shape, options, dtype, pairs, backend, device):
    both_ways(pairs, Pairs.HEADS, make(*shape, dtype, device), backend, **options)


# An even number of tiles, the last one ragged; heads and samples in odd numbers.
@pytest.mark.parametrize("shape", [(1, 200, 300, 3, 1, 128), (3, 129, 60, 1, 1, 64), (1, 512, 129, 1, 1, 128),
                                   (1, 140, 230, 1, 1, 192), (1, 256, 170, 1, 1, 256)])  # fmt: skip
def test_two_tiles(shape, pairs, backend, device):
    both_ways(pairs, Pairs.TILES, make(*shape, torch.bfloat16, device), backend, causal=False)


@pytest.mark.parametrize("options", FEATURES[1:])
def test_what_each_head_has_of_its_own(options, pairs, backend, device):
    """Slopes, dropout: of the block's head, not of the pair's first."""
    inputs = make(2, 140, 180, 2, 1, 128, torch.bfloat16, device)
    both_ways(pairs, Pairs.HEADS, inputs, backend, **on(device, options))


@pytest.mark.parametrize("options", [{}, {"window": (50, 1), "causal": False, "softcap": 1.0}, FEATURES[-2]])
def test_packed(options, pairs, backend, device):
    """Tiles of sequences that are not there, sequences without keys; one of NaN spoils no other."""
    inputs, both = packed_case(device, D=128)
    out, lse = both_ways(pairs, Pairs.HEADS, inputs, backend, cu_seqlens=both, **options)
    assert out[140].abs().max() == 0 and (lse[:, 140] == -torch.inf).all()
    inputs["q"][141:274] = inputs["k"][153:269] = inputs["v"][153:269] = torch.nan
    spoilt = attention(**inputs, cu_seqlens=both, backend=backend, **options)
    assert spoilt[141:274].isnan().all()
    assert torch.equal(spoilt[:141], out[:141]) and torch.equal(spoilt[274:], out[274:])


@pytest.mark.parametrize("blocks", [1, 3, 6, 132])
def test_any_number_of_blocks_and_sections(blocks, pairs, backend, device, monkeypatch):
    """Clusters for all, for some or for one of the tiles; rounds that end with a section, or not."""
    inputs = make(2, 140, 140, 6, 3, 64, torch.bfloat16, device)
    both_ways(pairs, Pairs.HEADS, inputs, backend, blocks)
    for heads in (2, 8):  # of 12
        monkeypatch.setattr(launchers, "heads_at_a_time", lambda *sizes, heads=heads: heads)
        both_ways(pairs, Pairs.HEADS, inputs, backend, blocks)
        both_ways(pairs, Pairs.TILES, inputs, backend, blocks, causal=False)


@pytest.mark.parametrize("D, tile", [(64, Tile(192, 128)), (128, Tile(128, 176))], ids=str)
@pytest.mark.parametrize("kind", [Pairs.HEADS, Pairs.TILES], ids=str)
def test_other_tiles(kind, D, tile, pairs, backend, device, monkeypatch):
    monkeypatch.setattr(launchers, "tile_for", lambda *problem: tile)
    inputs = make(1, 250, 390, 2, 1, D, torch.bfloat16, device)
    both_ways(pairs, kind, inputs, backend, 2, causal=kind is Pairs.HEADS)


@pytest.mark.only("simt")
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random:1", "random:2", "pct:1", "pct:2", "pct:3"])
def test_the_order_of_threads_does_not_matter(schedule, pairs, backend, device):
    """Of both blocks; and repeats have the same bits."""
    from megakern import _simt

    inputs = make(1, 140, 520, 2, 1, 128, torch.bfloat16, device)
    pairs(Pairs.NONE)
    single = attention(**inputs, backend=backend)
    pairs(Pairs.HEADS, 2)
    _simt.set_schedule(schedule)
    try:
        assert all(torch.equal(attention(**inputs, backend=backend), single) for _ in range(2))
    finally:
        _simt.set_schedule("forward")


@pytest.mark.parametrize(
    "kind, H, T, options, message",
    [(Pairs.HEADS, 3, 200, {}, "an even number of query heads of each head of keys, and in a section; got 3 and 3"),
     (Pairs.TILES, 2, 100, {"causal": False}, "an even number of tiles"), (Pairs.TILES, 2, 200, {}, "sees all keys"),
     (Pairs.TILES, 2, 200, {"causal": False, "window": (5, None)}, "sees all keys")],
)  # fmt: skip
def test_pairs_that_share_no_keys_are_refused(kind, H, T, options, message, pairs, backend, device):
    pairs(kind)
    with pytest.raises(ValueError, match=message):
        attention(**make(1, T, T, H, 1, 64, torch.bfloat16, device), backend=backend, **options)


def test_sections_that_part_a_pair_are_refused(pairs, backend, device, monkeypatch):
    pairs(Pairs.HEADS)
    monkeypatch.setattr(launchers, "heads_at_a_time", lambda *sizes: 1)
    with pytest.raises(ValueError, match="and in a section; got 2 and 1"):
        attention(**make(1, 8, 8, 2, 1, 64, torch.bfloat16, device), backend=backend)


def test_packed_tiles_are_refused(pairs, backend, device):
    pairs(Pairs.TILES)
    inputs, both = packed_case(device)
    with pytest.raises(ValueError, match="and not packed"):
        attention(**inputs, cu_seqlens=both, causal=False, backend=backend)


def test_the_pairs_of_a_problem():
    """From head dim 128 on: heads where a head of keys has an even number; else tiles, where that is even."""
    tile = Tile(128, 128)
    assert pairs_for(128, 100, 8, 1, tile, False) is pairs_for(256, 256, 16, 2, tile, True) is Pairs.HEADS
    assert pairs_for(128, 256, 3, 3, tile, True) is pairs_for(192, 1000, 3, 1, tile, True) is Pairs.TILES
    others = [(128, 256, 3, 3, tile, False), (128, 257, 3, 1, tile, True), (120, 256, 8, 1, tile, True)]
    assert {pairs_for(*problem) for problem in others} == {Pairs.NONE}


@pytest.mark.parametrize(
    "H, options, kind",
    [(4, {}, Pairs.HEADS), (2, {"causal": False}, Pairs.TILES), (2, {}, Pairs.NONE),
     (2, {"causal": False, "window": (9, None)}, Pairs.NONE), (2, {"causal": False, "window": (None, None)},
      Pairs.TILES)],
)  # fmt: skip
def test_explain_names_the_pairs_that_the_launcher_takes(H, options, kind, backend, device, monkeypatch):
    inputs = make(1, 200, 200, H, 2, 128, torch.bfloat16, device)
    taken = []
    monkeypatch.setattr(launchers, "pairs_for", lambda *problem: taken.append(pairs_for(*problem)) or taken[-1])
    attention(**inputs, backend=backend, **options)
    assert taken == [kind]
    assert f"persistent {kind};" in str(mk.explain("attention", **inputs, **options, backend=backend))
