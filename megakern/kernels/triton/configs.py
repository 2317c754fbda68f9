"""Every tile configuration that a Triton kernel may run with, by name, with the reason beside it; and the choice.

No figure here is measured yet: reasons are counts of registers and bytes, checked by `benchmarks/compile_report.py`.
A configuration depends on sizes and dtype alone, never on the machine or the clock, so results repeat everywhere.
Rule of thumb: 16 elements a thread are two 16-byte loads of bf16: enough in flight, without filling the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Config:
    """A named choice of compile-time tile sizes, warps a program and pipeline stages."""

    name: str
    tiles: dict[str, int]
    warps: int
    stages: int = 1
    why: str = ""


@dataclass(frozen=True)
class Op:
    """What the backend says of one public op: its configurations for a problem, and what it refuses."""

    choices: Callable[..., dict[str, Config]]
    refusal: Callable[..., str | None] = field(default=lambda problem: None)

    def describe(self, problem) -> str:
        parts = []
        for role, config in self.choices(problem).items():
            tiles = " ".join(f"{name}={size}" for name, size in config.tiles.items())
            parts.append(
                f"{role} {config.name!r} ({tiles}, {config.warps} warps, {config.stages} stages: {config.why})"
            )
        return "; ".join(parts)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


# --- norm: one program holds ROWS whole rows of COLS padded columns, or walks one row in chunks of COLS ---

NARROWEST = 128  # narrower rows are padded to this: fewer variants to compile
WIDEST_FORWARD = 16384  # a row and its weight in the registers of 16 warps, 32 elements of each a thread
WIDEST_BACKWARD = 8192  # the row, its gradient and two fp32 sums: 16384 columns of that fill the register file (256 KB)


def norm_programs(cols: int) -> int:
    """Programs of the backward pass, each with one fp32 row of weight-gradient sums.

    Up to 8 for each of about 132 SMs, as many as fit there; for wide rows fewer, so that the sums stay below 5 % of the
    bytes moved. Never the GPU's own count of SMs: sums must be the same on every GPU.
    """
    return min(1024, max(256, (1 << 20) // cols))


def norm_forward(C: int) -> Config:
    cols = max(NARROWEST, power_of_two(C))
    if cols > WIDEST_FORWARD:
        why = "a row in chunks of 16 elements a thread; the second reading of it comes from the L2 cache"
        return Config("forward-chunks", {"COLS": 8192}, 16, why=why)
    if cols <= 2048:
        return Config("forward-rows", {"ROWS": 2048 // cols, "COLS": cols}, 4, why="16 elements a thread")
    if cols == 4096:
        return Config("forward-row-8", {"ROWS": 1, "COLS": cols}, 8, why="16 elements a thread")
    why = "16 elements a thread" if cols == 8192 else "32 elements a thread, 128 registers at most"
    return Config("forward-row-16", {"ROWS": 1, "COLS": cols}, 16, why=why)


def norm_backward(C: int) -> Config:
    cols = max(NARROWEST, power_of_two(C))
    if cols > WIDEST_BACKWARD:
        return Config("backward-chunks", {"COLS": 4096}, 8, why="a row in chunks; its second reading comes from L2")
    if cols <= 1024:
        return Config("backward-rows", {"ROWS": 1024 // cols, "COLS": cols}, 4, why="8 elements of four a thread")
    warps = {2048: 4, 4096: 8, 8192: 16}[cols]
    return Config(f"backward-row-{warps}", {"ROWS": 1, "COLS": cols}, warps, why="16 elements of four a thread")


WEIGHT_GRADIENT_CHUNKS = Config(
    "weight-chunks", {"ROWS": 8, "COLS": 256}, 4, why="512 bytes of bf16 a row: whole sectors; 16 elements a thread"
)
SUM_PARTS = Config("sum-parts", {"PARTS": 64, "COLS": 32}, 4, why="128-byte lines of fp32; a program for 32 columns")


def _norm(problem) -> dict[str, Config]:
    C = problem.sizes["C"]
    return {"forward": norm_forward(C), "backward": norm_backward(C)}


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

CROSS_ENTROPY = Config("vocabulary-4096", {"COLS": 4096}, 8, why="16 elements a thread, one maximum for each piece")
ROW_SUMS = Config("row-sums", {"ROWS": 256}, 4, why="a few bytes a row: only the launch costs")


def _cross_entropy(problem) -> dict[str, Config]:
    ranks = problem.options["ranks"]
    return {"forward and backward": CROSS_ENTROPY} | ({"between ranks": ROW_SUMS} if ranks > 1 else {})


# --- linear: BM x BN tiles of the output, BK of the sum at a time, bands of GROUP tile rows ---

LINEAR = (  # the first that gives enough programs work
    Config(
        "256-wide", {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, 8, 3,
        why="most products for each byte of shared memory (147 KB); 128 fp32 sums a thread",
    ),
    Config(
        "square", {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3,
        why="twice the tiles of '256-wide' (98 KB of shared memory)",
    ),
    Config("small", {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 4, why="8 times the tiles of '256-wide'"),
)  # fmt: skip
LINEAR_FP32 = Config(
    "fp32", {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 3, why="no tensor cores in full precision: 32 sums a thread"
)
ENOUGH_TILES = 132  # one for each SM of the largest sm_90; never the GPU's own count, so that results repeat anywhere


def linear(M: int, N: int, dtype: torch.dtype, heavy: bool = False) -> Config:
    """heavy: the epilogue is an exact gelu or adds to what is there; '256-wide' spills registers with these."""
    if dtype == torch.float32:
        return LINEAR_FP32
    for config in LINEAR[heavy:-1]:
        if cdiv(M, config.tiles["BM"]) * cdiv(N, config.tiles["BN"]) >= ENOUGH_TILES:
            return config
    return LINEAR[-1]


def _linear(problem) -> dict[str, Config]:
    sizes = problem.sizes
    shapes = {"forward": ("M", "N"), "input gradient": ("M", "K"), "weight gradient": ("N", "K")}
    heavy = {"forward": problem.options["activation"] == "gelu"}
    return {role: linear(sizes[a], sizes[b], problem.dtype, heavy.get(role, False)) for role, (a, b) in shapes.items()}


def no_bf16_products(problem) -> str | None:
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use float16 or float32 there"
    return None


# --- attention: BM rows of queries meet BN keys at a time; BD is the head dim rounded up ---

SMALLEST_HEAD, LARGEST_HEAD = 16, 256


def head_tile(D: int) -> int:
    """Columns of a tile of queries, keys or values: a power of two that the matrix instructions take."""
    return max(SMALLEST_HEAD, power_of_two(D))


def _attention_tile(name: str, BM: int, BN: int, warps: int, stages: int, why: str) -> Config:
    return Config(name, {"BM": BM, "BN": BN}, warps, stages, why)


# (role, BD) -> the configuration of 16-bit dtypes, first, and the others that are worth a measurement.
ATTENTION: dict[tuple[str, int], tuple[Config, ...]] = {
    ("forward", 64): (
        _attention_tile("128x64", 128, 64, 4, 3, "64 fp32 scores and 64 sums a thread; three programs an SM"),
        _attention_tile("128x128", 128, 128, 8, 3, "64 scores and 32 sums a thread, half the steps"),
    ),
    ("forward", 128): (
        _attention_tile("128x128", 128, 128, 8, 2, "64 fp32 scores and 64 sums a thread; 160 KB of shared memory"),
        _attention_tile("128x64", 128, 64, 8, 3, "32 scores and 64 sums a thread"),
        _attention_tile("128x64-narrow", 128, 64, 4, 2, "two programs an SM: one multiplies, one exponentiates"),
    ),
    ("forward", 256): (
        _attention_tile("128x64", 128, 64, 8, 2, "32 fp32 scores and 128 sums a thread; 192 KB of shared memory"),
        _attention_tile("64x64", 64, 64, 4, 2, "the same a thread; 160 KB"),
    ),
    ("key-value gradient", 64): (
        _attention_tile("64x128", 64, 128, 8, 3, "32 + 32 fp32 scores, 32 + 32 sums a thread"),
        _attention_tile("128x128", 128, 128, 8, 2, "64 + 64 scores, 32 + 32 sums a thread, half the steps"),
    ),
    ("key-value gradient", 128): (
        _attention_tile("64x128", 64, 128, 8, 2, "32 + 32 fp32 scores, 64 + 64 sums a thread"),
        _attention_tile("32x128", 32, 128, 8, 3, "16 + 16 scores, 64 + 64 sums a thread"),
        _attention_tile("64x64", 64, 64, 4, 2, "32 + 32 scores, 64 + 64 sums a thread; two programs an SM"),
    ),
    ("key-value gradient", 256): (
        _attention_tile(
            "32x32", 32, 32, 8, 2,
            "sums of 64 keys do not fit beside the scores: neither in registers nor in the tensor memory of sm_100",
        ),
    ),
    ("query gradient", 64): (
        _attention_tile("128x64", 128, 64, 8, 3, "32 + 32 fp32 scores, 32 sums a thread"),
        _attention_tile("128x128", 128, 128, 8, 2, "64 + 64 scores, 32 sums a thread, half the steps"),
    ),
    ("query gradient", 128): (
        _attention_tile("128x64", 128, 64, 8, 2, "32 + 32 fp32 scores, 64 sums a thread"),
        _attention_tile("64x64", 64, 64, 4, 2, "the same a thread; two programs an SM"),
        _attention_tile("128x128", 128, 128, 8, 1, "64 + 64 scores, 64 sums a thread, half the steps"),
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


def attention(role: str, D: int, dtype: torch.dtype) -> Config:
    BD = head_tile(D)
    return ATTENTION_FP32[max(64, BD)] if dtype == torch.float32 else ATTENTION[role, BD][0]


def attention_row_sums(D: int) -> Config:
    rows = 4096 // head_tile(D)
    return Config("row-sums", {"ROWS": rows}, 4, why="32 elements of two tensors a thread")


def _attention(problem) -> dict[str, Config]:
    D = problem.sizes["D"]
    return {role: attention(role, D, problem.dtype) for role in ("forward", "key-value gradient", "query gradient")}


def _attention_refusal(problem) -> str | None:
    if problem.sizes["D"] > LARGEST_HEAD:
        return f"Triton's attention kernels take head dims up to {LARGEST_HEAD}, not {problem.sizes['D']}"
    return no_bf16_products(problem)


# --- linear_cross_entropy: chunks of rows whose logits take this many bytes, in the dtype of x ---

# Long products and few sums into dweight: for V = 131072 in bf16, 2048 rows.
LOGITS_BYTES = 512 << 20


def logits_rows(V: int, element_size: int) -> int:
    return max(1, LOGITS_BYTES // (V * element_size))


def _linear_cross_entropy(problem) -> dict[str, Config]:
    M, K, V = (problem.sizes[name] for name in ("M", "K", "V"))
    rows = min(M, logits_rows(V, problem.dtype.itemsize))
    return {
        f"logits of {rows} rows": linear(rows, V, problem.dtype),
        "loss": CROSS_ENTROPY,
        "input gradient": linear(rows, K, problem.dtype),
        "weight gradient": linear(V, K, problem.dtype, heavy=True),
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
    "attention": Op(_attention, _attention_refusal),
    "clip_grad_norm_": Op(_many),
    "cross_entropy": Op(_cross_entropy),
    "dropout": Op(_dropout),
    "gelu": Op(_gelu),
    "linear": Op(_linear, no_bf16_products),
    "linear_cross_entropy": Op(_linear_cross_entropy, no_bf16_products),
    "rope": Op(_rope),
    "swiglu": Op(_gelu),
    "layer_norm": Op(_norm),
    "rms_norm": Op(_norm),
}
