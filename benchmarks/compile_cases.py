"""The launches that `compile_report.py` compiles: for each kernel its dtypes, options and configurations.

Each case calls a launcher of `megakern/kernels/triton/` with meta tensors, so signatures cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megakern.kernels.triton import norm

CASES: dict[str, Callable[[], object]] = {}

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ROWS = 4096


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(C: int, dtype: torch.dtype, centre: bool, residual: bool, weight_dtype: torch.dtype) -> None:
    x, weight = tensor(ROWS, C, dtype=dtype), tensor(C, dtype=weight_dtype)
    y, _, mean, rstd = norm.norm_forward(x, weight, weight if centre else None, x if residual else None, 1e-5, centre)
    norm.norm_backward(y, y if residual else None, x, weight, mean, rstd, centre, centre)


def _add_norms() -> None:
    widths = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    for C in widths:
        for centre in (True, False):
            for dtype in SHORT:
                if dtype == torch.float16 and C not in (1024, 8192):
                    continue  # as bf16 but for one conversion instruction
                name = f"{'layer' if centre else 'rms'}_norm {C} {SHORT[dtype]}"
                CASES[name] = partial(_norm, C, dtype, centre, False, dtype)
                if dtype == torch.bfloat16:
                    CASES[f"{name} residual"] = partial(_norm, C, dtype, centre, True, torch.float32)


_add_norms()
