"""Sum of squares over a list of tensors for any device, from one multi-tensor norm."""

from __future__ import annotations

import torch


def sum_of_squares(tensors):
    """-> 0-d, fp32 (fp64 if any tensor is)."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).square_().sum()
