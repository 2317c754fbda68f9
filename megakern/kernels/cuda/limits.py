"""Which public ops the C++ kernels compute, and what they refuse: one table for the `cuda` and `simt` backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """What the C++ kernels say of one public op."""

    describe: str
    """How it is computed, for `mk.explain`."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    most: dict[str, int] = field(default_factory=dict)
    """The largest value of each limited size of a problem."""
    refusal: Callable[..., str | None] = field(default=lambda problem: None)
    """Any other reason not to compute a problem."""


_ELEMENTWISE = Op("16 bytes a thread and tensor at a time, where addresses and strides allow")

OPS: dict[str, Op] = {
    "gelu": _ELEMENTWISE,
    "swiglu": _ELEMENTWISE,
}


def refusal(problem) -> str | None:
    """Why the C++ kernels cannot compute `problem`, on whatever device, or None."""
    op = OPS.get(problem.op)
    if op is None:
        return "there is no C++ kernel for this op in this version"
    if problem.dtype not in op.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in op.dtypes)
        return f"its C++ kernels take {names}, not {problem.dtype}"
    for name, most in op.most.items():
        if problem.sizes[name] > most:
            return f"its C++ kernels take {name} up to {most}, got {problem.sizes[name]}"
    return op.refusal(problem)
