"""Outputs and views for launchers of compiled kernels: the one place where they allocate, and so where tests guard."""

from __future__ import annotations

import torch

allocate = torch.empty
"""What `empty` calls. Tests put an allocator here that surrounds each tensor with guard bands."""


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor."""
    return allocate(shape, dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of x's shape, dtype and device."""
    if allocate is torch.empty:  # the same, at 0.5 us instead of 1.8
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty(x.shape, x.dtype, x.device)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (M, C) whose rows are contiguous, at any distance; a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def tiles_of(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], int, int]:
    """Tensors of one shape as matrices (M, C) for an elementwise kernel -> them, M, C. One row where all are dense."""
    if all(x.is_contiguous() for x in tensors) or tensors[0].ndim == 0:
        rows = [x.reshape(1, -1) for x in tensors]
    else:
        rows = [rows_of(x) for x in tensors]
    return rows, *rows[0].shape
