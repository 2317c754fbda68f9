"""Linear layers whose weight is split over the tensor-parallel ranks (arXiv 1909.08053, section 3).

Letters: K in, N out, R ranks. x (..., K). f is copy_to_tensor_parallel, g is reduce_from_tensor_parallel.

    column-parallel: weight (N/R, K), bias (N/R,)
    forward   y (..., N/R) = act(f(x) W^T + b)        no traffic
    dgrad     dx (..., K) = f'(dz W)                  all-reduce (..., K)
    wgrad     dW (N/R, K) = dz^T x                    no traffic
    dbias     (N/R,) = sum of dz                      no traffic
    saved     x, W, and z if there is an activation

    row-parallel: weight (N, K/R), bias (N,) replicated
    forward   y (..., N) = g(x W^T) + b               all-reduce (..., N)
    dgrad     dx (..., K/R) = dy W                    no traffic
    wgrad     dW (N, K/R) = dy^T x                    no traffic
    dbias     (N,) = sum of dy                        no traffic, equal on every rank
    saved     x, W

The row-parallel bias is added once, after the reduce. On one rank f and g are the identity, and bias, activation and
residual are part of the matmul's op. Weights are cast to x's dtype; gradients arrive in the weight's own dtype.
"""

from __future__ import annotations

import torch
from torch import nn

from megakern.layers.parameter import Constant, Normal, add_parameter, initialize_standalone, local
from megakern.ops.linear import linear
from megakern.parallel.collectives import (
    copy_to_tensor_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    scatter_to_tensor_parallel,
)
from megakern.parallel.context import ParallelContext


class ColumnParallelLinear(nn.Module):
    """y = activation(x W^T + b) with the output features split: weight (N, K) as Shard(0), bias (N,) as Shard(0).

    `forward(x)`: x (..., K), the same on every rank -> (..., N/R), or (..., N) on every rank with `gather_output`.
    `project(x)` is the same without f and the gather, for several layers that read one copy of x.
    activation: None, "gelu", "gelu_tanh", "relu_squared" or "silu". Raises ValueError when tp does not divide N.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        gather_output: bool = False,
        activation: str | None = None,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.group, self.gather_output, self.activation = parallel.tp_group, gather_output, activation
        how = {"shard": 0, "device": device, "dtype": dtype}
        add_parameter(self, "weight", (out_features, in_features), Normal(init_std), parallel, **how)
        if bias:
            add_parameter(self, "bias", (out_features,), Constant(0.0), parallel, **how)
        else:
            self.register_parameter("bias", None)
        initialize_standalone(self)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) that went through f already -> (..., N/R)."""
        return linear(x, local(self.weight).to(x.dtype), local(self.bias), activation=self.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(copy_to_tensor_parallel(x, self.group))
        return gather_from_tensor_parallel(y, self.group) if self.gather_output else y


class RowParallelLinear(nn.Module):
    """y = x W^T + b (+ residual) with the input features split: weight (N, K) as Shard(1), bias (N,) as Replicate().

    `forward(x, residual=None)`: x (..., K/R), this rank's slice, or (..., K) with `input_is_parallel=False`;
    residual (..., N), the same on every rank -> (..., N) on every rank. Raises ValueError when tp does not divide K.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        input_is_parallel: bool = True,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.group, self.input_is_parallel = parallel.tp_group, input_is_parallel
        how = {"device": device, "dtype": dtype}
        add_parameter(self, "weight", (out_features, in_features), Normal(init_std), parallel, shard=1, **how)
        if bias:
            add_parameter(self, "bias", (out_features,), Constant(0.0), parallel, **how)
        else:
            self.register_parameter("bias", None)
        initialize_standalone(self)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel(x, self.group)
        weight, bias = local(self.weight).to(x.dtype), local(self.bias)
        if self.group is None:
            return linear(x, weight, bias, residual=residual)
        y = reduce_from_tensor_parallel(linear(x, weight), self.group)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if residual is None else y + residual
