"""The two compiled modules of csrc/, and the one way to call them: `megakern._C` for GPUs, `megakern._simt` for tests.

A module's functions take addresses and plain numbers, in the order of the structs of csrc/api.h; `megakern/_C.pyi`
lists them. C++ checks every argument before a launch.

On one core of a Xeon, the driver's own launch left out: 0.3 to 0.6 us a call of a module, 1.9 us a launcher with one
output, 5.1 to 5.9 a norm with its four, of which 0.6 to 0.8 each; 6.0 us AdamW of one tensor and 1.6 for each further
one (`python -m benchmarks.launch_cost`).
"""

from __future__ import annotations

import importlib
import os

import torch

from megakern.kernels.memory import rows_of as matrix_of
from megakern.kernels.memory import tiles_of

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int16: 3,
    torch.int32: 4,
    torch.int64: 5,
}
"""Codes of csrc/api.h."""


def _load(name: str) -> tuple[object | None, str]:
    try:
        return importlib.import_module(f"megakern.{name}"), ""
    except ModuleNotFoundError:
        return None, f"megakern.{name} is not built"
    except ImportError as error:
        return None, f"megakern.{name} does not load: {error}"


_C, C_ERROR = _load("_C")
_simt, SIMT_ERROR = _load("_simt")
if os.environ.get("MEGAKERN_CHECK_POINTERS", "0") not in ("", "0"):
    for _module in (_C, _simt):
        if _module is not None:
            _module.check_pointers(True)


def pointer(x: torch.Tensor | None) -> int:
    """The address of an optional tensor."""
    return 0 if x is None else x.data_ptr()


def call(function: str, anchor: torch.Tensor, *arguments) -> None:
    """Launch on anchor's device, on its current stream. `arguments`: the fields of the function's struct."""
    device = anchor.get_device()
    if device < 0:
        getattr(_simt, function)(*arguments, -1, 0)
    else:
        getattr(_C, function)(*arguments, device, torch._C._cuda_getCurrentRawStream(device))


def rows_of(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int, int, list[int]]:
    """Tensors of one shape, for an elementwise kernel -> (M, C) views, M, C, strides. One row if all are dense."""
    first = tensors[0]
    for x in tensors:
        if not x.is_contiguous():
            views, M, C = tiles_of(*tensors)
            return views, M, C, [x.stride(0) for x in views]
    C = first.numel()
    return tensors, 1, C, [C] * len(tensors)  # the addresses alone are used: no views, which cost 1 us each


def strided(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x (..., C) as rows with neighbouring elements -> it or a copy, and the distance of its rows."""
    if x.is_contiguous():
        return x, x.shape[-1]  # no view: the address alone is used
    x = matrix_of(x)
    return x, x.stride(0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
