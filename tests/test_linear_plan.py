"""The cost model of the C++ matrix product against what was measured on an H200, and what it must never choose."""

from __future__ import annotations

import pytest

from megakern.kernels.cuda.linear_plan import GATED, NN, NT, TILES, TN, choose, epilogue_weight, plan_of

H200 = 132
WIDE, SQUARE, BY_192, BY_160, FLAT = TILES
TIMED = WIDE, SQUARE, FLAT
BIAS_GELU = epilogue_weight(bias=True, activation=True)
# benchmarks/results/h200/tuning_linear.md, without clusters: TFLOP/s, or 1 / us. Where a shape was timed in both runs,
# the later one counts: between them the epilogue changed.
MEASURED = [
    ((8192, 8192, 8192), 0.0, {WIDE: 663, SQUARE: 674, FLAT: 521}),
    ((4096, 4096, 4096), 0.0, {WIDE: 731, SQUARE: 713, FLAT: 581}),
    ((2048, 2048, 2048), 0.0, {WIDE: 542, SQUARE: 569, FLAT: 495}),
    ((1024, 4096, 4096), 0.0, {WIDE: 675, SQUARE: 681, FLAT: 557}),
    ((64, 8192, 8192), 0.0, {WIDE: 102, SQUARE: 145, FLAT: 222}),
    ((8192, 28672, 4096), 0.0, {WIDE: 779, SQUARE: 688, FLAT: 468}),
    ((8192, 16384, 4096), 0.0, {WIDE: 1 / 1720, SQUARE: 1 / 1613}),
    ((8192, 16384, 4096), epilogue_weight(bias=True), {WIDE: 1 / 1748, SQUARE: 1 / 1634}),
    ((8192, 16384, 4096), BIAS_GELU, {WIDE: 1 / 1859, SQUARE: 1 / 1688}),
    ((8192, 16384, 4096), epilogue_weight(residual=True), {WIDE: 1 / 1748, SQUARE: 1 / 1701}),
]


@pytest.mark.parametrize("sizes, weight, rates", MEASURED)
def test_the_choice_is_the_measured_best_or_within_3_percent(sizes, weight, rates):
    chosen = choose(*sizes, H200, NT, weight, TIMED)
    assert rates[chosen.tile] >= 0.97 * max(rates.values()), f"{chosen} of {rates}"


def test_tiles_that_were_not_timed_are_taken_where_they_gain_more_than_the_model_may_err():
    """128 x 192: SwiGLU and the gate's products of Llama 8B, heavy epilogues; not the shapes of 4096 and below."""
    for sizes, weight, _ in MEASURED:
        plan, timed = (choose(*sizes, H200, NT, weight, tiles) for tiles in (TILES, TIMED))
        assert plan.tile in TIMED or plan.cycles < plan.tile.margin * timed.cycles
    everything = epilogue_weight(bias=True, activation=True)
    for sizes, layout, weight in (
        ((8192, 28672, 4096), GATED, epilogue_weight(activation=True)),
        ((8192, 28672, 4096), NT, 0.0),
        ((8192, 6144, 4096), NT, everything),
        ((8192, 14336, 4096), NN, everything),
    ):
        plan = choose(*sizes, H200, layout, weight)
        assert plan.tile == BY_192 and plan.cycles < 0.98 * choose(*sizes, H200, layout, weight, TIMED).cycles
    assert all(choose(size, size, size, H200).tile in TIMED for size in (1024, 2048, 4096))


def test_rounds_that_are_full():
    one, more = (plan_of(SQUARE, rows, 128, 4096, H200).cycles for rows in (128 * 132, 128 * 132 + 1))
    assert more == 2 * one
    assert choose(16, 28672, 4096, H200).tile == FLAT  # a taller tile computes rows that are not there


def test_a_heavy_epilogue_moves_the_choice_to_tiles_that_hide_it():
    sizes = (8192, 8192, 8192)
    assert choose(*sizes, H200).tile == WIDE and choose(*sizes, H200, NT, 0.4).tile == BY_192
    assert choose(*sizes, H200, NT, 2 * BIAS_GELU, TIMED).tile == SQUARE


@pytest.mark.parametrize("rows, cols, most", [(1792, 1792, 0.85), (768, 768, 0.6), (1024, 1024, 0.8)])
def test_few_tiles_and_many_tokens_are_split_along_k(rows, cols, most):
    """dW over 8192 tokens, of GPT-2 124M and 355M too: 196, 36 and 64 tiles of 128 x 128 for 132 multiprocessors."""
    plan = choose(rows, cols, 8192, H200, TN, epilogue_weight(wide=True))
    whole = min(plan_of(tile, rows, cols, 8192, H200, TN, epilogue_weight(wide=True)).cycles for tile in TILES)
    assert plan.splits > 1 and plan.cycles < most * whole
    assert plan.whole == plan.tiles // H200 * H200
    assert f"the last {plan.tiles - plan.whole} in {plan.splits} parts along K" in str(plan)


@pytest.mark.parametrize(
    "layout, sizes, rounds", [(NT, (8192, 1600, 1600), 5), (NN, (8192, 1600, 6400), 5), (TN, (1600, 1600, 8192), 1)]
)
def test_widths_of_gpt2_take_tiles_that_fill_their_rounds(layout, sizes, rounds):
    """10 columns of tiles of 160; of 128 there are 13, the last half empty, and more rounds of fewer columns."""
    plan = choose(*sizes, H200, layout)
    assert plan.tile == BY_160 and plan.splits == 1 and -(-plan.tiles // H200) == rounds
    others = [plan_of(tile, *sizes, H200, layout).cycles for tile in (WIDE, SQUARE, FLAT)]
    assert plan.cycles < BY_160.margin * min(others)
    assert choose(*sizes, H200, GATED).tile != BY_160


def test_nothing_is_split_where_it_gains_nothing():
    assert plan_of(SQUARE, 128 * 132, 128, 4096, H200, splits=4).splits == 1  # full rounds
    for sizes, weight, _ in MEASURED:
        if sizes[0] > 64:
            plan = choose(*sizes, H200, NT, weight)
            assert plan.splits == 1 and plan.whole == plan.tiles
    assert choose(16, 28672, 4096, H200).splits == 1  # the weight's bytes take longer than the products
    for layout in (NN, GATED):
        plan = choose(768, 768, 8192, H200, layout)
        assert plan.splits == 1 and "not in parts along K: registers run out in its epilogue" in str(plan)


def test_all_layouts_and_sizes_have_a_plan():
    for layout in (NT, NN, TN, GATED):
        for size in (8, 64, 200, 4096):
            for blocks in (1, 4, 132):
                plan = choose(size, size, size, blocks, layout)
                assert plan.tile in TILES and plan.cycles > 0 and plan.why in str(plan)
                assert 1 <= plan.splits <= max(1, size // 64 + 1) and 0 <= plan.whole <= plan.tiles
