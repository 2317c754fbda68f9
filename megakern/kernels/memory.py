"""Outputs and views for launchers of compiled kernels: the one place where they allocate, and so where tests guard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_uninitialised, _like, _dense = torch.empty, torch.empty_like, torch.contiguous_format  # 0.03 us a look-up

allocate = _uninitialised
"""What `empty` calls. Tests put an allocator here that surrounds each tensor with guard bands."""


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor."""
    if shape:  # its sizes one by one: as one argument torch reads them in 1.7 us in place of 0.9
        return allocate(*shape, dtype=dtype, device=device)
    return allocate((), dtype=dtype, device=device)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of x's shape, dtype and device."""
    if allocate is _uninitialised:  # the same, at 0.7 us in place of 1.0
        return _like(x, memory_format=_dense)
    return empty(x.shape, x.dtype, x.device)


def vector(count: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised elements of like's dtype, on its device."""
    if allocate is _uninitialised:  # the same, at 0.6 us in place of 0.8
        return like.new_empty(count)
    return empty((count,), like.dtype, like.device)


def nothing(x: torch.Tensor) -> torch.Tensor:
    """No elements, of x's dtype, on its device: what an op returns for an output that its options leave out."""
    return x.new_empty(0)  # 0.5 us, `empty` takes 0.8


def write_back(made: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a launcher changed in place, copied from the copies that it had to make of `given` -> given."""
    for x, y in zip(given, made, strict=True):
        if x is not y:
            x.copy_(y)
    return given


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


@contextlib.contextmanager
def contiguous_rows(params, grads, exp_avgs, exp_avg_sqs, masters, zero_grads) -> Iterator[dict[tuple, list[tuple]]]:
    """Lists of an optimizer's tensors -> {dtypes: rows (param, grad, exp_avg, exp_avg_sq, master if any)}, contiguous.

    What is written to the copy of a strided parameter is copied back at the end of the block; a strided gradient, of
    which the block sees a copy too, is zeroed then if `zero_grads`.
    """
    groups: dict[tuple, list[tuple]] = {}
    strided = []
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    for param, grad, *state in zip(*columns, strict=True):
        if param.numel() == 0:
            continue
        row = (param.contiguous(), grad.contiguous(), *state)
        if row[0] is not param or row[1] is not grad:
            strided.append((param, grad, *row[:2]))
        groups.setdefault(tuple([tensor.dtype for tensor in row]), []).append(row)  # a generator: 0.3 us more
    yield groups
    for param, grad, flat_param, flat_grad in strided:
        if flat_param is not param:
            param.copy_(flat_param)
        if zero_grads and flat_grad is not grad:
            grad.zero_()
