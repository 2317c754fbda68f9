"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): the weight stays, a product of rank r learns.

Letters: K in, N out, r rank, R tensor-parallel ranks, s = alpha / r.

    y = x W^T + b + s (x A^T) B^T        A (r, K) normal, B (N, r) zero: a fresh adapter changes nothing

    column-parallel   A replicated, B (N/R, r) Shard(0); A reads the x that W reads, so it takes no traffic of its own
                      in forward and dgrad. Each rank's dA is the part of its outputs, summed by finish_gradients.
    row-parallel      A (r, K/R) Shard(1), B replicated; x A^T of r columns is summed over the ranks as x W^T is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from megakern.layers.parameter import Constant, Normal, add_parameter, local
from megakern.ops.linear import linear
from megakern.parallel.blocks import local_of
from megakern.parallel.context import ParallelContext

TARGETS = {"qkv": ("qkv",), "proj": ("proj",), "fc": ("fc1", "gate", "up", "fc2")}
"""What can be adapted, and the names of those linear layers."""


class LowRank(nn.Module):
    """The adapter of one linear layer. `forward(h, y)`: h = x A^T (..., r), y = x W^T + b (..., N) -> y + s h B^T."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        row_parallel: bool,
        parallel: ParallelContext,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scale, self.row_parallel = scale, row_parallel
        self.region = parallel.tensor_region
        how = {"device": device, "dtype": dtype}
        start = Normal(1 / math.sqrt(3 * in_features))  # the variance of the paper's own code
        add_parameter(self, "a", (rank, in_features), start, parallel, shard=1 if row_parallel else None, **how)
        add_parameter(
            self, "b", (out_features, rank), Constant(0.0), parallel, shard=None if row_parallel else 0, **how
        )

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        b = local(self.b, partial=self.row_parallel and self.region.shards_sequence)
        return linear(h * self.scale, b, residual=y)

    @torch.no_grad()
    def merge_into(self, weight: torch.Tensor) -> None:
        """Adds s B A to the layer's weight, a rank's slice each; computed in fp32, rounded once."""
        shard, a, b = (local_of(tensor) for tensor in (weight, self.a, self.b))
        wide = torch.float64 if shard.dtype == torch.float64 else torch.float32
        shard.copy_(shard.to(wide) + self.scale * (b.to(wide) @ a.to(wide)))


def add_adapters(
    model: nn.Module, parallel: ParallelContext, *, rank: int, alpha: float, targets: Sequence[str]
) -> None:
    """Adapters on every linear layer that `targets` names; all other parameters stop learning.

    Made where the layers' weights are, also on "meta"; `initialize` or `materialize` fills them. Before `fully_shard`.
    """
    names = {name for target in targets for name in TARGETS[target]}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] in names and hasattr(layer, "adapter"):
            out_features, in_features = layer.weight.shape
            layer.adapter = LowRank(
                in_features,
                out_features,
                rank=rank,
                scale=alpha / rank,
                row_parallel=layer.row_parallel,
                parallel=parallel,
                device=layer.weight.device,
                dtype=layer.weight.dtype,
            )


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    return {f"{path}.{name}" for path, module in _adapters(model) for name in ("a", "b")}


def merge_adapters(model: nn.Module) -> None:
    """Every adapter into its layer's weight, in place; the model is a plain one afterwards."""
    for path, adapter in list(_adapters(model)):
        layer = model.get_submodule(path.rpartition(".")[0])
        adapter.merge_into(layer.weight)
        layer.adapter = None


def _adapters(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LowRank))
