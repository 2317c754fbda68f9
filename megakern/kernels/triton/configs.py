"""Every tile configuration that a Triton kernel may run with, by name, with the reason beside it; and the choice.
Those of attention are in attention_configs.py.

A figure says where it was measured; other reasons are counts of registers and bytes, checked by
`benchmarks/compile_report.py`.
A configuration depends on sizes, dtype and the GPU's generation alone, never on the clock, so that results repeat.
Rule of thumb: 16 elements a thread are two 16-byte loads of bf16: enough in flight, without filling the registers.
"""

from __future__ import annotations

import functools

import torch

from megakern.kernels.triton import attention_configs
from megakern.kernels.triton.tile_config import Choice, Config, Op, cdiv, generation, no_bf16_products, power_of_two

MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}  # of the largest GPU of a generation


def persistent(config: Config) -> int:
    """Programs of a launch that walk through all rows: as many as a GPU of this generation runs at once, so that none
    waits for another to end. Never the GPU's own count: the sums that they leave must be the same on all of its kind.
    """
    return config.resident * MULTIPROCESSORS[generation()]


# --- norm: one program holds ROWS whole rows of COLS padded columns, or walks one row in chunks of COLS ---

NARROWEST = 128  # narrower rows are padded to this: fewer variants to compile
WIDEST_FORWARD = 32768  # a row and its weight in the registers of 32 warps, 32 elements of each a thread
WIDEST_BACKWARD = 8192  # the row, its gradient and two fp32 sums: 16384 columns of that fill the register file (256 KB)


def norm_forward(C: int) -> tuple[Config, ...]:
    """The table's choice, and after it what tuning may try instead."""
    cols = max(NARROWEST, power_of_two(C))
    chunks = Config(
        "forward-chunks", {"COLS": 8192}, 16,
        why="a row in chunks of 16 elements a thread; the second reading of it comes from the L2 cache",
    )  # fmt: skip
    if cols > WIDEST_FORWARD:
        return (chunks,)
    more = (chunks,) if cols == WIDEST_FORWARD else ()
    if cols <= 2048:
        rows = 2048 // cols
        first = Config("forward-rows", {"ROWS": rows, "COLS": cols}, 4, why="16 elements a thread")
        return first, Config("forward-rows-2", {"ROWS": 2 * rows, "COLS": cols}, 4, why="32 elements a thread")
    one = {"ROWS": 1, "COLS": cols}
    widths = {4096: (8, 4, 16), 8192: (8, 16), 16384: (16, 32), 32768: (32,)}  # 8192: 73 us on an H200 against 79
    few = "8 bytes on sm_100 of fp32 with a residual: 1024 threads have 64 registers each" if cols == 32768 else ""
    options = (
        Config(f"forward-row-{w}", one, w, why=f"{cols // w // 32} elements a thread", spills=few) for w in widths[cols]
    )
    return (*options, *more)


def norm_backward(C: int, column_bytes: int) -> tuple[Config, ...]:
    """Rows of 16 elements a thread: their values and two sums each take the 128 registers of 512 threads an SM. STAGES:
    tiles on their way, this one included; of three, 64 KB of bf16 are in flight on an SM, at any width.

    On an H200, us of LayerNorm | RMSNorm before both sums were one reduction and statistics came a tile ahead:
    32768 x 4096, stages 3, 2, 1: 200, 269, 255 | 200, 251, 238; 8192 x 8192, stages 2, 1: 170, 153 | 156, 136;
    65536 x 1024 of 4 warps, 924 of whose 1024 programs fit: 131, 175, 169 | 103, 115, 113; 4096 x 32768 in chunks of
    4096, whose rows on all SMs, 84 MB, are more than L2 has: 511 | 455. With today's kernel: not yet measured.
    """
    cols = max(NARROWEST, power_of_two(C))
    few = "48 bytes or less, in a loop that waits for memory: ptxas prefers fewer registers, so that more programs fit"
    if cols > WIDEST_BACKWARD:
        reasons = {
            16384: "one row an SM at a time, so that all of them stay in L2 for their second reading",
            8192: "one or two rows an SM at a time, as registers allow",
            4096: "three to five rows an SM, which go beyond L2",
        }
        if column_bytes >= 8:  # fp32, which spills 80 bytes with 64 registers
            del reasons[16384]
        return tuple(
            Config(
                f"backward-chunks-{chunk}",
                {"COLS": chunk},
                chunk // 512,
                spills=few,
                why=f"16 elements a thread; {why}",
            )
            for chunk, why in reasons.items()
        )
    rows, warps = max(1, 512 // cols), max(1, cols // 512)
    name = f"backward-row-{warps}" if rows == 1 else f"backward-rows-{rows}"
    resident = 16 // warps if rows == 1 else 15  # of 4 rows of fp32 with a residual, with 136 registers

    def staged(stages: int, why: str) -> Config:
        tiles = {"ROWS": rows, "COLS": cols, "STAGES": stages}
        return Config(f"{name}-stages-{stages}", tiles, warps, why=why, spills=few, resident=resident)

    at_once = staged(1, "16 elements of four a thread; other programs load while one computes")
    if column_bytes > 8:  # of all that is read: fp32 with a residual. Two tiles ahead are 192 KB, which sm_80 has not
        return staged(2, "16 elements of four a thread; 96 KB an SM on their way"), at_once
    return staged(3, "16 elements of four a thread; two tiles on their way, also where one program fits an SM"), at_once


WEIGHT_GRADIENT_CHUNKS = Config(
    "weight-chunks", {"ROWS": 8, "COLS": 256, "STAGES": 3}, 4, resident=4,
    why="512 bytes of bf16 a row: whole sectors; 16 elements a thread",
)  # fmt: skip
SUM_PARTS = Config(
    "sum-parts", {"PARTS": 256, "COLS": 16, "STAGES": 3}, 8,
    why="64 bytes of fp32 a row: whole sectors; a program for 16 columns, few steps that wait",
)  # fmt: skip


def norm(which: str, C: int, dtype: torch.dtype, centre: bool, residual: bool) -> Choice:
    """which: "forward" or "backward". A compiler's symbolic size becomes a number here: the cache cannot hash it."""
    return _norm_choice(which, int(C), dtype, centre, residual)


@functools.lru_cache(maxsize=256)
def _norm_choice(which, C, dtype, centre, residual) -> Choice:
    kind = f"{'layer' if centre else 'rms'}_norm{' residual' if residual else ''}"
    column_bytes = dtype.itemsize * (3 if residual else 2)
    options = norm_forward(C) if which == "forward" else norm_backward(C, column_bytes)
    return Choice(options, f"{kind} {which} {str(dtype).removeprefix('torch.')} C={C}")


def _norm(problem) -> dict[str, Choice]:
    kind = (problem.sizes["C"], problem.dtype, problem.op == "layer_norm", problem.options["residual"])
    return {which: norm(which, *kind) for which in ("forward", "backward")}


# --- elementwise: tiles of ROWS x COLS ---


def elementwise(C: int) -> Config:
    cols = min(1024, max(16, power_of_two(C)))
    return Config("elementwise", {"ROWS": 1024 // cols, "COLS": cols}, 4, why="16 bytes of bf16 a thread and tensor")


def tile_count(M: int, C: int, config: Config) -> int:
    return cdiv(M, config.tiles["ROWS"]) * cdiv(C, config.tiles["COLS"])


def rope(H: int, D: int, d: int) -> Config:
    half, rest = power_of_two(d), D - 2 * d
    heads = min(power_of_two(H), max(1, 1024 // half))
    tiles = {"HEADS": heads, "HALF": half, "REST": power_of_two(rest) if rest else 0}
    return Config("token", tiles, 4, why="1024 pairs at a time, 8 a thread; a token's angles are read once")


def _gelu(problem) -> dict[str, Config]:
    return {"forward and backward": elementwise(problem.sizes["elements"])}


def _dropout(problem) -> dict[str, Config]:
    return {"forward and backward": elementwise(problem.sizes["C"])}


def _rope(problem) -> dict[str, Config]:
    sizes = problem.sizes
    return {"forward and backward": rope(sizes["H"], sizes["D"], sizes["D_rot"] // 2)}


# --- cross-entropy ---


def _vocabulary_config(steps: int, lanes: int, warps: int, why: str) -> Config:
    spills = "8 bytes on sm_90 of fp32: ptxas prefers 48 registers, so that more programs fit" if steps == 2 else ""
    return Config(
        f"vocabulary-{steps}x{lanes}-{warps}", {"STEPS": steps, "LANES": lanes}, warps, why=why, spills=spills
    )


# With a maximum of the whole row for each piece, for which all threads of a program waited, an H200 took 605 us of
# 8192 x 131072 (83 % of its copy rate; three stages 621, pieces twice as long 670). With one a lane: not yet measured.
CROSS_ENTROPY = (
    _vocabulary_config(4, 1024, 4, "four 16-byte loads of bf16 a thread on their way; 1.25 exponentials a column"),
    _vocabulary_config(4, 2048, 8, "the same a thread; half as many programs, which take turns less often"),
    _vocabulary_config(2, 2048, 8, "two loads a thread, of more threads; 1.5 exponentials a column"),
    _vocabulary_config(8, 1024, 4, "eight loads a thread; 1.12 exponentials a column"),
)
CROSS_ENTROPY_GRADIENT = tuple(  # 95 % of an H200's copy rate with the first
    Config(f"gradient-{cols}", {"COLS": cols}, cols // 512, why="16 elements a thread") for cols in (4096, 8192, 2048)
)
ROW_SUMS = Config("row-sums", {"ROWS": 256}, 4, why="a few bytes a row: only the launch costs")


def _vocabulary(M: int, V: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} M<={power_of_two(M)} V<={power_of_two(V)}"


def cross_entropy(M: int, V: int, dtype: torch.dtype) -> Choice:
    return Choice(CROSS_ENTROPY, f"cross_entropy forward {_vocabulary(M, V, dtype)}")


def cross_entropy_gradient(M: int, V: int, dtype: torch.dtype) -> Choice:
    return Choice(CROSS_ENTROPY_GRADIENT, f"cross_entropy backward {_vocabulary(M, V, dtype)}")


def _cross_entropy(problem) -> dict[str, Config | Choice]:
    kind = (problem.sizes["M"], problem.sizes["V"], problem.dtype)
    choices = {"forward": cross_entropy(*kind), "backward": cross_entropy_gradient(*kind)}
    return choices | ({"between ranks": ROW_SUMS} if problem.options["ranks"] > 1 else {})


# --- linear: BM x BN tiles of the output, BK of the sum at a time, bands of GROUP tile rows ---


def _linear_config(name: str, BM: int, BN: int, BK: int, warps: int, stages: int, why: str, spills: str = "") -> Config:
    return Config(name, {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8}, warps, stages, why, spills)


WIDE = _linear_config("256-wide", 128, 256, 64, 8, 3, "most products a byte of shared memory (147 KB)")
WIDE_DEEP = _linear_config("256-wide-4", 128, 256, 64, 8, 4, "one more stage in flight (196 KB)")
TALL = _linear_config("256-tall", 256, 128, 64, 8, 3, "as '256-wide', for few columns")
SQUARE = _linear_config(
    "square", 128, 128, 64, 8, 3, "twice the tiles of '256-wide' (98 KB)",
    spills="8 bytes on sm_80 where it adds to 16-bit values: one register, stored once and read once a tile",
)  # fmt: skip
SQUARE_4 = _linear_config("square-4-warps", 128, 128, 64, 4, 4, "one warpgroup: two programs share an SM")
SMALL = _linear_config(
    "small", 64, 64, 64, 4, 4, "8 times the tiles of '256-wide'",
    spills="8 bytes on sm_100: ptxas prefers 72 registers, so that more programs fit",
)  # fmt: skip
WIDE_FLAT = _linear_config("256-wide-flat", 128, 256, 32, 8, 4, "for sm_100, where '256-wide' spills if transposed")
HALF = _linear_config("half", 64, 128, 64, 8, 4, "to add to the output: 32 sums a thread, and their addresses")
LINEAR_FP32 = _linear_config(
    "fp32", 64, 64, 16, 4, 3, "no tensor cores in full precision: 32 sums a thread",
    spills="16 bytes on sm_80: full precision waits for its multiplications, 16 a step and sum",
)  # fmt: skip
LINEAR = (WIDE, WIDE_DEEP, TALL, SQUARE, SQUARE_4, SMALL, WIDE_FLAT, HALF)
ENOUGH_TILES = 132  # one for each SM of the largest sm_90; never the GPU's own count, so that results repeat anywhere


def linear(
    M: int, N: int, dtype: torch.dtype, transposed: bool, heavy: bool, accumulate: bool, generation: int
) -> tuple[Config, ...]:
    """The table's choice, and after it what tuning may try instead.

    transposed: the left operand is read by columns. heavy: much follows each sum (an exact gelu; an activation and a
    residual). accumulate: the output is read as well. The first that gives enough programs work, and spills nothing.
    """
    if dtype == torch.float32:
        return (LINEAR_FP32,)
    if accumulate:
        large, medium = (), (HALF,) if generation == 10 else (SQUARE, HALF)
    elif generation == 8:  # twice the registers for operands that sm_90 reads from shared memory: '256-wide' spills
        large, medium = (), (SQUARE,)
    elif generation == 9:
        large, medium = (WIDE, WIDE_DEEP, TALL), (SQUARE,) if heavy else (SQUARE, SQUARE_4)
        if transposed:  # the others spill then
            large, medium = large[:1], medium[:1]
        large = () if heavy else large
    else:
        large, medium = () if heavy else (WIDE_FLAT,) if transposed else (WIDE, WIDE_FLAT), (SQUARE,)
    options = (*large, *medium, SMALL)
    enough = [c for c in options if cdiv(M, c.tiles["BM"]) * cdiv(N, c.tiles["BN"]) >= ENOUGH_TILES]
    first = enough[0] if enough else SMALL
    return (first, *(config for config in options if config is not first))


def product(M: int, N: int, K: int, dtype: torch.dtype, transposed=False, heavy=False, accumulate=False) -> Choice:
    """For out (M, N) = a (M, K) b (K, N). The class of problems that share a tuned choice: sizes to powers of two."""
    return _product(int(M), int(N), int(K), dtype, transposed, heavy, accumulate, generation())


@functools.lru_cache(maxsize=1024)
def _product(M, N, K, dtype, transposed, heavy, accumulate, generation) -> Choice:
    sizes = " ".join(f"{name}<={power_of_two(size)}" for name, size in (("M", M), ("N", N), ("K", K)))
    flags = "".join(f" {n}" for n, on in (("t", transposed), ("heavy", heavy), ("accumulate", accumulate)) if on)
    options = linear(M, N, dtype, transposed, heavy, accumulate, generation)
    return Choice(options, f"linear {str(dtype).removeprefix('torch.')} {sizes}{flags}")


def is_heavy(activation: str, residual: bool) -> bool:
    return activation == "gelu" or (activation != "" and residual)


def _linear(problem) -> dict[str, Choice]:
    (M, N, K), options = (problem.sizes[name] for name in ("M", "N", "K")), problem.options
    heavy = is_heavy(options["activation"] or "", options["residual"])
    return {
        "forward": product(M, N, K, problem.dtype, heavy=heavy),
        "input gradient": product(M, K, N, problem.dtype),
        "weight gradient": product(N, K, M, problem.dtype, transposed=True),
    }


def _linear_swiglu(problem) -> dict[str, Choice]:
    M, N, K = (problem.sizes[name] for name in ("M", "N", "K"))
    return {
        "gate and up, a product each": product(M, N, K, problem.dtype),
        "silu(gate) * up": elementwise(N),
        "input gradient": product(M, K, N, problem.dtype),
        "weight gradients": product(N, K, M, problem.dtype, transposed=True),
    }


# --- linear_cross_entropy: chunks of rows whose logits take this many bytes, in the dtype of x ---

# Long products and few sums into dweight: for V = 131072 in bf16, 2048 rows.
LOGITS_BYTES = 512 << 20


def logits_rows(V: int, element_size: int) -> int:
    return max(1, LOGITS_BYTES // (V * element_size))


def _linear_cross_entropy(problem) -> dict[str, Choice]:
    M, K, V = (problem.sizes[name] for name in ("M", "K", "V"))
    rows = min(M, logits_rows(V, problem.dtype.itemsize))
    return {
        f"logits of {rows} rows": product(rows, V, K, problem.dtype),
        "loss": cross_entropy(rows, V, problem.dtype),
        "input gradient": product(rows, K, V, problem.dtype),
        "weight gradient": product(V, K, rows, problem.dtype, transposed=True, accumulate=True),
    }


# --- many tensors in one launch ---

MANY_TENSORS = Config(
    "pieces-8192", {"PIECE": 8192, "TILE": 1024}, 4,
    why="8 elements of each tensor a thread at a time; 8 tiles share one reading of the tables",
)  # fmt: skip
TOTAL = Config("total", {"LANES": 4096}, 8, why="one program for what many left")


def _many(problem) -> dict[str, Config]:
    return {"step" if problem.op == "AdamW" else "pieces": MANY_TENSORS}


OPS = {
    "AdamW": Op(_many),
    "attention": Op(attention_configs.choices, attention_configs.refusal),
    "clip_grad_norm_": Op(_many),
    "cross_entropy": Op(_cross_entropy),
    "dropout": Op(_dropout),
    "gelu": Op(_gelu),
    "paged_attention": Op(attention_configs.decoding, attention_configs.refusal),
    "linear": Op(_linear, no_bf16_products),
    "linear_swiglu": Op(_linear_swiglu, no_bf16_products),
    "linear_cross_entropy": Op(_linear_cross_entropy, no_bf16_products),
    "rope": Op(_rope),
    "swiglu": Op(_gelu),
    "layer_norm": Op(_norm),
    "rms_norm": Op(_norm),
}
