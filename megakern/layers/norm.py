"""LayerNorm and RMSNorm with their parameters. Letters: C channels.

    LayerNorm   weight (C,), bias (C,)   replicated over tp
    RMSNorm     weight (C,)              replicated over tp

Replicated input gives every rank the same gradients. Under sequence parallelism the input is a rank's own tokens, and
the gradients of weight and bias are parts of a sum, which `finish_gradients` makes.
"""

from __future__ import annotations

import torch
from torch import nn

from megakern.layers.parameter import Constant, add_parameter, initialize_standalone, local
from megakern.ops.norm import layer_norm, norm_of_stream, rms_norm
from megakern.parallel.context import ParallelContext


class LayerNorm(nn.Module):
    """LayerNorm over the last dim of size `width`.

    `forward(x, residual=None)`: x (..., C) -> y like x; with residual `(y, x + residual)`.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        parallel: ParallelContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.eps, self.region = eps, parallel.tensor_region
        add_parameter(self, "weight", (width,), Constant(1.0), parallel, device=device, dtype=dtype)
        if bias:
            add_parameter(self, "bias", (width,), Constant(0.0), parallel, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)
        initialize_standalone(self)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        partial = self.region.shards_sequence
        weight, bias = local(self.weight, partial=partial), local(self.bias, partial=partial)
        return layer_norm(x, weight, bias, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"

    def of_stream(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """self(x), and x to go on with: its gradient is added in the norm's backward."""
        partial = self.region.shards_sequence
        weight, bias = local(self.weight, partial=partial), local(self.bias, partial=partial)
        return norm_of_stream(x, weight, bias, self.eps, centre=True)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim of size `width`.

    `forward(x, residual=None)`: x (..., C) -> y like x; with residual `(y, x + residual)`.
    `per_rank`: each tp rank norms rows of its own (heads, say), so that its gradient of weight is a part of the sum.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        per_rank: bool = False,
        parallel: ParallelContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.eps, self.per_rank, self.region = eps, per_rank, parallel.tensor_region
        add_parameter(self, "weight", (width,), Constant(1.0), parallel, device=device, dtype=dtype)
        initialize_standalone(self)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        weight = local(self.weight, partial=self.per_rank or self.region.shards_sequence)
        return rms_norm(x, weight, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def of_stream(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """self(x), and x to go on with: its gradient is added in the norm's backward."""
        weight = local(self.weight, partial=self.per_rank or self.region.shards_sequence)
        return norm_of_stream(x, weight, None, self.eps, centre=False)
