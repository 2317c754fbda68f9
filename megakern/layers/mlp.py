"""The feed-forward half of a block. Letters: C channels, F inner size, R ranks. x (B, T, C).

plain    h (B, T, F/R) = act(f(x) fc1^T + b1)                             fc1 (F/R, C)
swiglu   h (B, T, F/R) = silu(f(x) gate^T + bg) * (f(x) up^T + bu)        gate, up (F/R, C), one f for both
both     y (B, T, C)   = g(h fc2^T) + b2                                  fc2 (C, F/R)

forward: one all-reduce (B, T, C) in g. dgrad: one all-reduce (B, T, C) in f. wgrad: no traffic. Under sequence
parallelism x and y are (B, T/R, C); forward: an all-gather in f, a reduce-scatter in g; backward: an all-gather of dy,
another of x, a reduce-scatter of dx. Saved: x (its shard), h, and the pre-activation (plain) or gate and up (swiglu).
Both layers of the inner half are one product, and the gradient of what the activation saw is another, that of fc2's
input: megakern/ops/mlp.py.
"""

from __future__ import annotations

import torch
from torch import nn

from megakern.layers.dropout import DropoutKey
from megakern.layers.linear import ColumnParallelLinear, RowParallelLinear, column_activated
from megakern.ops.activation import KINDS
from megakern.parallel.context import ParallelContext


class ParallelMLP(nn.Module):
    """fc2(activation(fc1(x))), or the gated fc2(silu(gate(x)) * up(x)) for activation "swiglu" (arXiv 2002.05202).

    `forward(x, residual=None, dropout_key=None)`: x (B, T, C) -> (B, T, C), plus residual (B, T, C) when given; all are
    (B, T/R, C) under sequence parallelism.
    `output_init_std` is that of fc2; None: `init_std`. Raises ValueError when tp does not divide `ffn_size`, and
    for another activation.
    """

    def __init__(
        self,
        width: int,
        ffn_size: int,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        parallel.shard(ffn_size, "ffn_size")
        kinds = (*KINDS, "swiglu")
        if activation not in kinds:
            raise ValueError(f"mlp: activation must be one of {', '.join(kinds)}, got {activation!r}")
        self.activation, self.gated = activation, activation == "swiglu"
        how = {"bias": bias, "parallel": parallel, "device": device, "dtype": dtype}
        if self.gated:
            self.gate = ColumnParallelLinear(width, ffn_size, init_std=init_std, **how)
            self.up = ColumnParallelLinear(width, ffn_size, init_std=init_std, **how)
        else:
            self.fc1 = ColumnParallelLinear(width, ffn_size, activation=activation, init_std=init_std, **how)
        output_init_std = init_std if output_init_std is None else output_init_std
        self.fc2 = RowParallelLinear(ffn_size, width, init_std=output_init_std, **how)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dropout_key: DropoutKey | None = None
    ) -> torch.Tensor:
        layers = [self.gate, self.up] if self.gated else [self.fc1]
        return self.fc2(column_activated(x, layers, self.activation, dropout_key), residual, dropout_key=dropout_key)
