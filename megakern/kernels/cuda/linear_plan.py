"""Which tiles a product of csrc/linear.cu takes: one cost model, a pure function.

A block computes tiles until there are none left, so all blocks are busy but in the last round: with 169 tiles for 132
blocks it is 37 tiles that cost as much as the 132 before them. Those 37 may be computed in parts along K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

NT, NN, TN, GATED = range(4)
"""enum Layout of csrc/api.h: a (M, K) b (N, K); a (M, K) b (K, N); a (K, M) b (K, N); as the first, of two b."""

DEPTH = 64  # of K a step of the main loop
MULTIPLY_ADDS = 2048  # of bf16 or fp16, a cycle and multiprocessor of sm_90
MEMORY_BYTES = 2450  # a cycle: 4.3 TB/s, measured as a copy, at 1.755 GHz

# What a tile in parts costs beside its steps. Expected from the L2 cache's rate, 5.5 TB/s or 24 bytes a cycle and
# multiprocessor while all write, and more for the few that read; not yet measured, so the gain must be more than its
# error may be.
WRITTEN_BYTES, READ_BYTES = 24, 40  # a cycle and multiprocessor
SPLIT_START = 3500  # cycles: 2 us to set the counters of arrivals to zero
SPLIT_MARGIN = 0.95  # a split must be expected to take at most this share of the time without
MOST_SPLITS = 16
SPLIT_LAYOUTS = NT, TN  # with the epilogues of the others registers run out


@dataclass(frozen=True)
class Tile:
    """A tile shape of csrc/linear.cu, and what the cost model has to know of it."""

    rows: int
    cols: int
    cluster: int
    """Blocks that compute tiles below each other and share their columns' operand."""
    rate: float
    """Share of the tensor cores' peak that the main loop reaches when all blocks run."""
    epilogue: int
    """Cycles a tile in which the block multiplies nothing. Ping-pong hides most of it."""
    more: int = 0
    """Cycles beside those for an epilogue of weight 1 (`epilogue_weight`)."""
    splits: bool = True
    """May be computed in parts along K. In other shapes than these registers run out."""
    gated: bool = True
    """Half of it may be the gate's columns, half those of up."""
    margin: float = 1.0
    """What it is expected to take must be at most this share of another's: below 1 where `rate` is not yet measured."""

    def __str__(self) -> str:
        return f"tiles of {self.rows} x {self.cols}" + (f" in clusters of {self.cluster}" if self.cluster > 1 else "")

    def count(self, M: int, N: int) -> int:
        """Tiles of an output (M, N), those of a cluster as one."""
        return -(-M // (self.rows * self.cluster)) * -(-N // self.cols)

    def multiply(self, steps: int) -> float:
        """Cycles for so many steps of a tile. The layouts differ in how many copies a step takes, which nothing waits
        for any more: that they take the same time is not yet measured."""
        return steps * DEPTH * self.rows * self.cols / MULTIPLY_ADDS / self.rate


# Fitted to times on an H200, bf16, in results/h200/tuning_linear.md; tests/test_linear_plan.py holds the choice against
# all of them. 128 x 192 and 128 x 160 (for sizes that 160 divides, as GPT-2's 1600, 4800 and 6400): not yet measured.
# Their rates are expected to lie between those of the two measured shapes as what passes through shared memory does:
# 1.08 and 1.15 cycles for one of multiplying, beside 1.00 of 128 x 256 and 1.25 of 128 x 128. Neither comes in parts
# along K: nt of 160 and tn of both into 16 bits spill 12 to 88 bytes, and no product of the layers in tuning_linear.md
# would take them. Halves of 160 are not whole chunks of 64 columns, so gated products take the others.
TILES = (
    Tile(128, 256, 1, rate=0.866, epilogue=4860, more=7600, splits=False),
    Tile(128, 128, 1, rate=0.81, epilogue=300, more=2100),
    Tile(128, 192, 1, rate=0.845, epilogue=500, more=3150, splits=False, margin=0.98),
    Tile(128, 160, 1, rate=0.83, epilogue=400, more=2600, splits=False, gated=False, margin=0.96),
    Tile(64, 128, 1, rate=0.50, epilogue=300, more=1050),
)
# Compiled too, and not chosen: benchmarks/tune_linear.py times them beside the others.
OTHER_TILES = (
    Tile(128, 256, 2, rate=0.86, epilogue=4860, more=7600, splits=False),
    Tile(128, 128, 2, rate=0.75, epilogue=300, more=2100, splits=False),
)


def epilogue_weight(
    *, bias: bool = False, activation: bool = False, residual: bool = False, wide: bool = False
) -> float:
    """What follows a product, in units of a bias and a gelu_tanh (8192 x 16384 x 4096 on an H200: 139 us with tiles of
    128 x 256, 75 with 128 x 128). wide: fp32 results, added to memory or not; not yet measured."""
    return 0.2 * bias + 0.8 * activation + 0.2 * residual + 0.35 * wide


@dataclass(frozen=True)
class Plan:
    """How one product is computed."""

    tile: Tile
    tiles: int
    """Of the output; those of a cluster count as one."""
    whole: int
    """So many of them are computed by one block each; the others in `splits` parts along K."""
    splits: int
    cycles: float
    """What the model expects."""
    why: str

    def __str__(self) -> str:
        return f"{self.tile} ({self.why})"


@functools.lru_cache(maxsize=1024)
def choose(
    M: int, N: int, K: int, blocks: int, layout: int = NT, weight: float = 0.0, tiles: tuple[Tile, ...] = TILES
) -> Plan:
    """The cheapest plan of a product (M, N) of sums over K on so many multiprocessors, what follows it of `weight`."""
    least = 2 * (M * K + N * K + M * N) / MEMORY_BYTES

    def cost(plan: Plan) -> tuple[float, float]:
        cycles = max(plan.cycles, least)
        return cycles / plan.tile.margin / (1.0 if plan.splits == 1 else SPLIT_MARGIN), plan.cycles

    most = min(MOST_SPLITS, -(-K // DEPTH))
    plans = (
        plan_of(tile, M, N, K, blocks, layout, weight, splits)
        for tile in tiles
        if tile.gated or layout != GATED
        for splits in range(1, (most if tile.splits and layout in SPLIT_LAYOUTS else 1) + 1)
    )
    best = min(plans, key=cost)
    bound = "" if best.cycles > least else "; reading takes longer"
    return replace(best, cycles=max(best.cycles, least), why=best.why + bound)


def plan_of(
    tile: Tile, M: int, N: int, K: int, blocks: int, layout: int = NT, weight: float = 0.0, splits: int = 1
) -> Plan:
    """The plan with these tiles, those of the last round that is not full in so many parts."""
    at_once, tiles, steps = max(1, blocks // tile.cluster), tile.count(M, N), -(-K // DEPTH)
    epilogue = tile.epilogue + weight * tile.more
    each = tile.multiply(steps) + epilogue
    rounds, last = divmod(tiles, at_once)
    why = f"{tiles}, {at_once} at a time" + (f": {rounds} rounds" if rounds else "")
    if not last:
        return Plan(tile, tiles, tiles, 1, rounds * each, why)
    if splits == 1:
        why += f" and one of {last}" * bool(rounds)
        why += "" if layout in SPLIT_LAYOUTS else ", not in parts along K: registers run out in its epilogue"
        return Plan(tile, tiles, tiles, 1, (rounds + 1) * each, why)
    parts = -(-last * splits // at_once)
    bytes_of_a_part = 4 * tile.rows * tile.cols
    part = tile.multiply(-(-steps // splits)) + bytes_of_a_part / WRITTEN_BYTES
    end = epilogue + splits * bytes_of_a_part / READ_BYTES + SPLIT_START
    why += f", the last {last} in {splits} parts along K each: {parts / splits:.2f} rounds in place of 1"
    return Plan(tile, tiles, tiles - last, splits, rounds * each + parts * part + end, why)
