"""Where every Triton kernel is launched and every output allocated: the one place to trace, record or guard them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from megakern.kernels.triton.configs import Config

allocate = torch.empty
"""What `empty` calls. Tests put an allocator here that surrounds each tensor with guard bands."""

_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its arguments in order, its compile-time constants and its configuration."""

    kernel: object
    arguments: tuple
    constants: dict[str, object]
    config: Config


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor."""
    return allocate(shape, dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of x's shape, dtype and device."""
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


def launch(kernel, grid: tuple[int, ...], *arguments, config: Config, **constants) -> None:
    """Run `kernel` on `grid` programs with the tiles, warps and stages of `config`; nothing when the grid is empty.

    Under torch.compile the launch goes into the graph through `wrap_triton`, so that inductor sees the kernel.
    """
    if 0 in grid:
        return
    constants = {**config.tiles, **constants}
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, config))
        return
    options = {"num_warps": config.warps, "num_stages": config.stages}
    anchor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    if isinstance(anchor, FunctionalTensor):
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants, **options)
    elif anchor.device.type == "cuda":
        with torch.cuda.device_of(anchor):
            kernel[grid](*arguments, **constants, **options)
    else:
        kernel[grid](*arguments, **constants, **options)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block nothing runs; the launches are collected instead. Launchers then take meta tensors."""
    global _recorded
    assert _recorded is None, "recordings do not nest"
    _recorded = launches = []
    try:
        yield launches
    finally:
        _recorded = None
