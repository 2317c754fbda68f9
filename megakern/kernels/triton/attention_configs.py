"""As configs.py, for attention: BM rows of queries meet BN keys at a time; BD is the head dim rounded up."""

from __future__ import annotations

import functools

import torch

from megakern.kernels.triton.tile_config import Choice, Config, cdiv, generation, no_bf16_products, power_of_two

SMALLEST_HEAD, LARGEST_HEAD = 16, 256


def head_tile(D: int) -> int:
    """Columns of a tile of queries, keys or values: a power of two that the matrix instructions take."""
    return max(SMALLEST_HEAD, power_of_two(D))


def _attention_tile(
    name: str, BM: int, BN: int, warps: int, stages: int, why: str, generations: tuple[int, ...] = (8, 9, 10)
) -> Config:
    spills = (
        "not mended: sums and scores exceed 255 registers. Gradients of keys and values spill outside of their loops "
        "on sm_90 and sm_100: addresses of the next head's first tiles"
    )
    return Config(name, {"BM": BM, "BN": BN}, warps, stages, why, spills, generations)


# (role, BD) -> the configuration of 16-bit dtypes, first, and the others that are worth a measurement.
# Figures of head dim 128: benchmarks/tune_attention.py on an H200, triton 3.6, bf16, causal, 2x8192x64x8x128, each
# kernel alone. Other head dims, and other generations than 9, are not yet measured: there, what does not spill comes
# first. Counts of spilled bytes are those of `compile_report` with triton 3.7.
ATTENTION: dict[tuple[str, int], tuple[Config, ...]] = {
    ("forward", 64): (
        _attention_tile("128x64", 128, 64, 4, 3, "64 fp32 scores and 64 sums a thread; three programs an SM", (9, 10)),
        _attention_tile("128x64-8-warps", 128, 64, 8, 3, "of 4 warps on sm_80 48 bytes spill, in the loop", (8,)),
        _attention_tile(
            "128x128", 128, 128, 8, 3,
            "64 scores and 32 sums a thread, half the steps; on sm_100 80 bytes spill, in the loop", (9,),
        ),
    ),
    ("forward", 128): (
        _attention_tile("128x128", 128, 128, 8, 3, "495 TFLOP/s; two stages 419, one 343", (9,)),
        _attention_tile("128x64", 128, 64, 8, 3, "453; two stages 417, four 446; spills nothing on sm_80 and sm_100"),
    ),
    ("forward", 256): (
        _attention_tile("128x64", 128, 64, 8, 2, "32 fp32 scores and 128 sums a thread; 192 KB of shared memory"),
        _attention_tile("64x64", 64, 64, 4, 2, "the same a thread; 160 KB"),
    ),
    # What spills in this pass, with triton 3.6 on sm_90 some 400 bytes, are addresses of the next head's first tiles:
    # read once for each head of a group, outside of the loops.
    ("key-value gradient", 64): (
        _attention_tile("64x128", 64, 128, 8, 3, "32 + 32 fp32 scores, 32 + 32 sums a thread", (9,)),
        _attention_tile("64x128-2-stages", 64, 128, 8, 2, "spills nothing with triton 3.7", (9,)),
        _attention_tile(
            "32x128", 32, 128, 8, 2, "16 + 16 scores, spills nothing; 64 rows 640 bytes on sm_100, 96 on sm_80", (8, 10)
        ),
        _attention_tile("64x64", 64, 64, 8, 2, "spills nothing either, with half of the 128 rows of tcgen05", (10,)),
    ),
    ("key-value gradient", 128): (
        # 16 bytes spill on sm_90, once for each head of a group; when it was measured, 144.
        _attention_tile("32x128", 32, 128, 8, 4, "339 TFLOP/s; three stages 308; 64x128, which spills, 301", (9,)),
        _attention_tile("32x64", 32, 64, 4, 3, "329; two stages 281", (9,)),
        _attention_tile("32x64-8-warps", 32, 64, 8, 2, "spills nothing; with 128 keys 40 bytes", (8,)),
        _attention_tile("32x128-2-stages", 32, 128, 8, 2, "480 bytes spill, none in a loop; four stages 696", (10,)),
        _attention_tile("32x128-1-stage", 32, 128, 8, 1, "spills nothing, and loads nothing ahead", (10,)),
    ),
    ("key-value gradient", 256): (
        # Counted, not measured: with 32 keys products are mma, and a step of 32 x 32 reads 390 KB of shared memory; of
        # 64 keys they are wgmma, and a step of twice the work reads 350 KB.
        _attention_tile("32x64", 32, 64, 8, 2, "wgmma, 128 sums a thread", (9,)),
        _attention_tile(
            "32x32", 32, 32, 8, 2,
            "sums of 64 keys do not fit beside the scores: neither in registers nor in the tensor memory of sm_100",
        ),
    ),
    ("query gradient", 64): (
        _attention_tile("128x64", 128, 64, 8, 3, "32 + 32 fp32 scores, 32 sums a thread"),
        _attention_tile("128x128", 128, 128, 8, 2, "64 + 64 scores, 32 sums a thread, half the steps", (9, 10)),
    ),
    ("query gradient", 128): (
        _attention_tile("128x64", 128, 64, 8, 3, "381 TFLOP/s; two stages 362, one 291; sm_80 spills 32", (9, 10)),
        _attention_tile("64x64", 64, 64, 4, 2, "377; three stages 329"),
    ),
    ("query gradient", 256): (
        _attention_tile("64x64", 64, 64, 8, 2, "16 + 16 fp32 scores, 64 sums a thread"),
        _attention_tile("64x32", 64, 32, 4, 2, "16 + 16 scores, 128 sums a thread"),
    ),
}  # fmt: skip
ATTENTION |= {(role, BD): ATTENTION[role, 64] for role, _ in list(ATTENTION) for BD in (16, 32)}
ATTENTION_FP32 = {  # for every role: full precision has no tensor cores, and more sums a thread spill
    64: _attention_tile("fp32-32x32", 32, 32, 8, 2, "at most 16 fp32 sums a thread"),
    128: _attention_tile("fp32-16x32", 16, 32, 8, 2, "at most 32 fp32 sums a thread"),
    256: _attention_tile("fp32-16x16", 16, 16, 8, 2, "at most 32 fp32 sums a thread"),
}


def attention(role: str, D: int, dtype: torch.dtype, T: int, S: int, kind: str) -> Choice:
    """kind: of `attention_kind`."""
    return _attention_choice(role, int(D), dtype, int(T), int(S), kind, generation())


@functools.lru_cache(maxsize=1024)
def _attention_choice(role, D, dtype, T, S, kind, generation) -> Choice:
    BD = head_tile(D)
    options = (ATTENTION_FP32[max(64, BD)],) if dtype == torch.float32 else ATTENTION[role, BD]
    options = tuple(config for config in options if generation in config.generations)
    sizes = f"D<={BD} T<={power_of_two(T)} S<={power_of_two(S)}"
    return Choice(options, f"attention {role} {str(dtype).removeprefix('torch.')} {sizes} {kind}")


def attention_kind(window: tuple[int, int], plain: bool, packed: bool) -> str:
    """What decides on the time beside sizes. window: sides below 0 have no limit. plain: scores are scaled products."""
    sides = [f"<={power_of_two(side)}" if side >= 0 else "any" for side in window]
    mask = {(True, True): "full", (True, False): "causal" if window[1] == 0 else ""}.get((window[0] < 0, window[1] < 0))
    return (mask or f"window {sides[0]} {sides[1]}") + ("" if plain else " featured") + (" packed" if packed else "")


FEW_ROWS = 64  # of a group's query heads together: one block of the decoding kernel
COMBINE = Config("combine", {"SPLITS": 128}, 1, why="a row of out: splits x D sums for one warp")


def decodes(T: int, G: int, packed: bool, dropout: bool) -> bool:
    """Is the forward pass that of attention_decode.py? For as few rows as fit one block of it."""
    return T * G <= FEW_ROWS and not packed and not dropout


def attention_decode(rows: int, D: int, dtype: torch.dtype) -> Config:
    """16 or 32 rows are multiplied by mma on sm_90 too, as wgmma has 64: reading the keys is the whole cost."""
    BM, BD, bytes_a_row = min(FEW_ROWS, max(16, power_of_two(rows))), head_tile(D), head_tile(D) * dtype.itemsize
    if dtype == torch.float32:  # operands in registers
        return _attention_tile(f"decode-fp32-{BD}", 16, 16, 4, 2, "16 rows at a time, without tensor cores")
    BN = min(128, max(32, 16384 // bytes_a_row))
    # On sm_100, where a thread has whole rows of scores, 64 x 128 of them spill 184 bytes with 4 warps, none with 8.
    warps = 8 if BM * BN > 4096 and generation() == 10 else 4
    why = "16 KB of keys in flight a stage, several programs an SM"
    return _attention_tile(f"decode-{BM}x{BN}", BM, BN, warps, 3, why)


PROGRAMS = 264  # two for each SM of the largest sm_90, which hide each other's latency; never the GPU's own count


def key_splits(programs: int, S: int, config: Config) -> int:
    """Pieces of the keys: the fewest within 85 % of the best share of busy places, each of two blocks or more."""
    if programs == 0:
        return 1
    most = max(1, min(COMBINE.tiles["SPLITS"], cdiv(S, 2 * config.tiles["BN"])))
    busy = [n * programs / (cdiv(n * programs, PROGRAMS) * PROGRAMS) for n in range(1, most + 1)]
    return 1 + next(n for n, share in enumerate(busy) if share >= 0.85 * max(busy))


def decoding(problem) -> dict[str, Config]:
    T, H, Hkv, D = (problem.sizes[name] for name in ("T", "H", "Hkv", "D"))
    return {"decode": attention_decode(T * (H // Hkv), D, problem.dtype)}


def choices(problem) -> dict[str, Config | Choice]:
    (T, S, H, Hkv, D), how = (problem.sizes[name] for name in ("T", "S", "H", "Hkv", "D")), problem.options
    left, right = (-1 if side is None else side for side in (how["window"] or (None, None)))
    plain = not (how["softcap"] or how["alibi"] or how["dropout"])
    kind = attention_kind((left, 0 if how["causal"] else right), plain, how["packed"])
    few = decodes(T, H // Hkv, how["packed"], how["dropout"])
    roles = ("key-value gradient", "query gradient") if few else ("forward", "key-value gradient", "query gradient")
    return (decoding(problem) if few else {}) | {role: attention(role, D, problem.dtype, T, S, kind) for role in roles}


def refusal(problem) -> str | None:
    if problem.sizes["D"] > LARGEST_HEAD:
        return f"Triton's attention kernels take head dims up to {LARGEST_HEAD}, not {problem.sizes['D']}"
    return no_bf16_products(problem)
