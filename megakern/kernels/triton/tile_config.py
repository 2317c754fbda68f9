"""What a configuration of a Triton kernel is: tile sizes, warps and stages, for GPUs of some generations."""

from __future__ import annotations

import functools
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
    spills: str = ""
    """Why spilled registers are tolerated on some architecture; "" where they are not."""
    generations: tuple[int, ...] = (8, 9, 10)
    """Of GPUs that it is for, see `generation`."""
    resident: int = 0
    """Programs that fit a multiprocessor at once, for a kernel whose programs walk through the rows, see `persistent`.
    `benchmarks/compile_report.py` holds registers and shared memory against it. 0: one program a tile."""

    @functools.cached_property
    def keywords(self) -> dict[str, int]:
        """What a launch passes by name for it."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Choice:
    """The configurations that one class of problems may run with, the table's choice first."""

    options: tuple[Config, ...]
    key: str = ""
    """The class of problems, for tuning."""


@dataclass(frozen=True)
class Op:
    """What the backend says of one public op: its configurations for a problem, and what it refuses."""

    choices: Callable[..., dict[str, Config | Choice]]
    refusal: Callable[..., str | None] = field(default=lambda problem: None)


def generation() -> int:
    """Major number of the compute capability, 8 to 10. Where there is no GPU 9, or what `launch.recording` stands for.

    Kernels of one generation are the same machine code; between generations results differ by rounding anyway.
    """
    return recorded_generation or _own_generation()


recorded_generation: int | None = None


@functools.cache
def _own_generation() -> int:
    return min(10, torch.cuda.get_device_capability()[0]) if torch.cuda.is_available() else 9


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def no_bf16_products(problem) -> str | None:
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use float16 or float32 there"
    return None
