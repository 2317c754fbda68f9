"""The `cuda` backend: C++ kernels for NVIDIA GPUs from sm_80 on, compiled from csrc/ into `megakern._C`.

The same launchers serve the `simt` backend, which runs the same sources on CPU tensors (`megakern/kernels/simt`).
"""

from __future__ import annotations

import functools

import torch

from megakern.kernels.constant import constant_result
from megakern.kernels.cuda import toolkit
from megakern.kernels.cuda.limits import OPS, configuration, refusal
from megakern.kernels.cuda.module import _C, C_ERROR

__all__ = ["OPS", "configuration", "describe", "supports", "unavailable"]


def unavailable() -> str | None:
    if _C is None:
        return describe()
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    return None


def describe() -> str:
    """The compiled module in one line, for `megakern doctor`."""
    if _C is None:
        return f"{C_ERROR}; {toolkit.how_to_build()}"
    return f"megakern._C, {_C.built}"


def supports(problem) -> str | None:
    if problem.device != "cuda":
        return f"CUDA kernels run on NVIDIA GPUs, not on {problem.device!r} tensors"
    return _unsuited() or refusal(problem)


@constant_result
def _unsuited() -> str | None:
    return _unsuited_gpu()


@functools.cache  # asking costs several us, as much as a launch
def _unsuited_gpu() -> str | None:
    return toolkit.unsuited(_C.built, torch.cuda.get_device_capability())
