"""Inputs for tests of Triton kernels: random, and surrounded by NaN that must never reach a result."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> torch.Tensor:
    """Normal numbers, the same on every device, rounded to `dtype`."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device=device, dtype=dtype)


def fenced(x: torch.Tensor, before: int = 16, after: int = 13) -> torch.Tensor:
    """The same values as a view whose rows lie between NaN, and with rows of NaN above and below."""
    rows = x.reshape(-1, x.shape[-1])
    field = torch.full(
        (rows.shape[0] + 2, before + rows.shape[1] + after), float("nan"), dtype=x.dtype, device=x.device
    )
    inside = field[1:-1, before : before + rows.shape[1]]
    inside.copy_(rows)
    return inside.view(x.shape) if x.ndim == 2 else inside.unflatten(0, x.shape[:-1])
