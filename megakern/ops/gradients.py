"""Where the gradient of a weight goes: its dtype, and the accumulated gradient that it may be added to in place.

A weight that an op reads carries this as its attribute `gradient_target`, where a layer has put one (see
`megakern/layers/parameter.py`); without it the gradient is a new tensor of the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class GradientTarget:
    """`dtype` of the gradient; `parameter`: the leaf whose `.grad` may be added to, or None."""

    dtype: torch.dtype
    parameter: torch.Tensor | None = None

    def accumulated(self) -> torch.Tensor | None:
        """This rank's accumulated gradient, to add to; None where there is none yet, or not of this dtype."""
        grad = None if self.parameter is None else self.parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.to_local()
        return None if grad is None or grad.dtype != self.dtype else grad


def target_of(weight: torch.Tensor) -> GradientTarget:
    """Where the gradient of `weight` goes, as an op's forward sees it."""
    return getattr(weight, "gradient_target", None) or GradientTarget(weight.dtype)
