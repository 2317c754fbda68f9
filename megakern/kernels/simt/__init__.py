"""The `simt` backend: the CUDA sources of csrc/, compiled for the CPU as `megakern._simt` and run thread by thread.

For tests alone: a thousand times slower than any other backend, never chosen automatically. csrc/simt/ keeps the rules
of the hardware, so that a kernel with a missing barrier gives a wrong answer here too. Launchers are those of `cuda`.
"""

from __future__ import annotations

from megakern.kernels.cuda.limits import OPS, configuration, refusal
from megakern.kernels.cuda.module import SIMT_ERROR, _simt

__all__ = ["LAUNCHERS", "OPS", "configuration", "supports", "unavailable"]

LAUNCHERS = "cuda"


def unavailable() -> str | None:
    if _simt is None:
        return f"{SIMT_ERROR}; `make simt` builds it, for tests"
    return None


def supports(problem) -> str | None:
    if problem.device != "cpu":
        return f"it runs CUDA sources on CPU tensors, not on {problem.device!r} ones"
    return refusal(problem)
