"""Linear layers whose weight is split over the tensor-parallel ranks (arXiv 1909.08053, section 3).

Letters: K in, N out, R ranks. x (..., K). f is what enters a tensor-parallel region, g what leaves it (region.py): f is
the identity and g an all-reduce, or under sequence parallelism an all-gather and a reduce-scatter over T, the last dim
but one. parallel_linear.py has the order in which collectives and products run.

    column-parallel: weight (N/R, K), bias (N/R,)
    forward   y (..., N/R) = act(f(x) W^T + b)        no traffic
    dgrad     dx (..., K) = f'(dz W)                  all-reduce (..., K); sequence: reduce-scatter
    wgrad     dW (N/R, K) = dz^T f(x)                 no traffic; sequence: all-gather x again
    dbias     (N/R,) = sum of dz                      no traffic
    saved     x (its shard), W, and z if there is an activation

    row-parallel: weight (N, K/R), bias (N,) replicated
    forward   y (..., N) = g(x W^T) + b               all-reduce (..., N); sequence: reduce-scatter
    dgrad     dx (..., K/R) = g'(dy) W                no traffic; sequence: all-gather dy
    wgrad     dW (N, K/R) = g'(dy)^T x                no traffic
    dbias     (N,) = sum of dy                        no traffic; sequence: partial, summed by finish_gradients
    saved     x, W

The row-parallel bias is added once, after the reduce. On one rank f and g are the identity, and bias, activation and
residual are part of the matmul's op. Weights are cast to x's dtype where they are read; gradients arrive in the
weight's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megakern.layers.dropout import DropoutKey
from megakern.layers.hooks import watched
from megakern.layers.lora import LowRank
from megakern.layers.parallel_linear import column_parallel_activated, column_parallel_linear, row_parallel_linear
from megakern.layers.parameter import Constant, Normal, add_parameter, initialize_standalone, local
from megakern.ops.activation import KINDS, activate, swiglu
from megakern.ops.mlp import Activated, linear_after
from megakern.parallel.collectives import gather_from_tensor_parallel, scatter_to_tensor_parallel
from megakern.parallel.context import ParallelContext


class ColumnParallelLinear(nn.Module):
    """y = activation(x W^T + b) with the output features split: weight (N, K) as Shard(0), bias (N,) as Shard(0).

    `forward(x, dropout_key=None)`: x (..., K) in the residual stream's layout, the same on every rank or a rank's
    tokens -> (..., N/R) of all tokens, or (..., N) on every rank with `gather_output`. The key is for an adapter's
    dropout.
    activation: None, "gelu", "gelu_tanh", "relu_squared" or "silu". adapter: a LowRank, or None.
    Raises ValueError when tp does not divide N, and for another activation.
    """

    row_parallel = False

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
        if activation is not None and activation not in KINDS:
            raise ValueError(f"linear: activation must be None or one of {', '.join(KINDS)}, got {activation!r}")
        self.region, self.gather_output, self.activation = parallel.tensor_region, gather_output, activation
        how = {"shard": 0, "device": device, "dtype": dtype}
        add_parameter(self, "weight", (out_features, in_features), Normal(init_std), parallel, **how)
        if bias:
            add_parameter(self, "bias", (out_features,), Constant(0.0), parallel, **how)
        else:
            self.register_parameter("bias", None)
        self.adapter: LowRank | None = None
        initialize_standalone(self)

    def forward(self, x: torch.Tensor, dropout_key: DropoutKey | None = None) -> torch.Tensor:
        (y,) = column_outputs(x, [self], dropout_key)
        return gather_from_tensor_parallel(y, self.region.group) if self.gather_output else y

    def extra_repr(self) -> str:
        return _sizes(self) + (f", activation={self.activation}" if self.activation else "")


def _sizes(layer: ColumnParallelLinear | RowParallelLinear) -> str:
    """Of the whole layer, for `print(model)`."""
    N, K = layer.weight.shape
    split = f", tp={layer.region.size}" if layer.region.size > 1 else ""
    return f"in_features={K}, out_features={N}, bias={layer.bias is not None}{split}"


def column_outputs(
    x: torch.Tensor, layers: Sequence[ColumnParallelLinear], key: DropoutKey | None = None
) -> list[torch.Tensor]:
    """activation(x W^T + b), with what adapters add, of layers that read one x: they share its gathered copy."""
    region, activation = layers[0].region, layers[0].activation
    pairs = [(local(layer.weight), local(layer.bias)) for layer in layers]
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    if not adapters:
        return list(column_parallel_linear(x, pairs, region, activation=activation))
    lows = [(local(adapter.a, partial=region.group is not None), None) for adapter in adapters]
    if adapters[0].drops():  # what each of them reads is its own
        outputs = column_parallel_linear(x, pairs, region)
        read = [adapter.dropped(x, key) for adapter in adapters]
        hidden = iter(
            [column_parallel_linear(*each, region)[0] for each in zip(read, [[low] for low in lows], strict=True)]
        )
    else:
        outputs = column_parallel_linear(x, pairs + lows, region)
        hidden = iter(outputs[len(layers) :])
    outputs = [
        y if layer.adapter is None else layer.adapter(next(hidden), y)
        for layer, y in zip(layers, outputs[: len(layers)], strict=True)
    ]
    return outputs if activation is None else [activate(y, activation) for y in outputs]


def column_activated(
    x: torch.Tensor, layers: Sequence[ColumnParallelLinear], activation: str, key: DropoutKey | None = None
) -> torch.Tensor | Activated:
    """The input of a row-parallel layer: what one layer with `activation` gives, or silu(gate) * up of two ("swiglu").

    As `Activated` where nothing stands between: an adapter adds to what the activation sees, torch's fused collectives
    have no epilogue, and a layer with hooks is called.
    """
    region, hooked = layers[0].region, watched(*layers)
    if hooked or region.fused_collectives or any(layer.adapter is not None for layer in layers):
        outputs = [layer(x, dropout_key=key) for layer in layers] if hooked else column_outputs(x, layers, key)
        return swiglu(*outputs) if activation == "swiglu" else outputs[0]
    pairs = [(local(layer.weight), local(layer.bias)) for layer in layers]
    return column_parallel_activated(x, pairs, region, activation)


class RowParallelLinear(nn.Module):
    """y = x W^T + b (+ residual) with the input features split: weight (N, K) as Shard(1), bias (N,) as Replicate().

    `forward(x, residual=None, dropout_key=None)`: x (..., K/R), this rank's slice of all tokens (also as `Activated`),
    or (..., K) with `input_is_parallel=False`; residual and result (..., N) in the residual stream's layout.
    Raises ValueError when tp does not divide K.
    """

    row_parallel = True

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
        self.region, self.input_is_parallel = parallel.tensor_region, input_is_parallel
        how = {"device": device, "dtype": dtype}
        add_parameter(self, "weight", (out_features, in_features), Normal(init_std), parallel, shard=1, **how)
        if bias:
            add_parameter(self, "bias", (out_features,), Constant(0.0), parallel, **how)
        else:
            self.register_parameter("bias", None)
        self.adapter: LowRank | None = None
        initialize_standalone(self)

    def extra_repr(self) -> str:
        return _sizes(self)

    def forward(
        self,
        x: torch.Tensor | Activated,
        residual: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        if not self.input_is_parallel:
            x = scatter_to_tensor_parallel(x, self.region.group)
        weight, bias = local(self.weight), local(self.bias, partial=self.region.shards_sequence)
        if self.region.group is None:
            y = linear_after(x, weight, bias, residual)
        else:
            y = row_parallel_linear(x, weight, self.region)
            y = y if bias is None else y + bias.to(y.dtype)
            y = y if residual is None else y + residual
        if self.adapter is None:
            return y
        read = self.adapter.dropped(x, dropout_key) if self.adapter.drops() else x
        return self.adapter(row_parallel_linear(read, local(self.adapter.a), self.region), y)
