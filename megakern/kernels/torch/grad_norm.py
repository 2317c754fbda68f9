"""Sum of squares over a list of tensors for any device: one call of our C++ kernel on CPUs, or a multi-tensor norm."""

from __future__ import annotations

import torch

from megakern.kernels.torch import native


def sum_of_squares(tensors):
    """-> 0-d, fp32 (fp64 if any tensor is)."""
    if native.takes_many(tensors):
        return torch.tensor(native.sum_of_squares(tensors), dtype=torch.float32)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).square_().sum()
