"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): the weight stays, a product of rank r learns.

Letters: K in, N out, r rank, R tensor-parallel ranks, s = alpha / r.

    y = x W^T + b + s (drop(x) A^T) B^T        A (r, K) normal, B (N, r) zero: a fresh adapter changes nothing

    column-parallel   A replicated, B (N/R, r) Shard(0); A reads the x that W reads, so it takes no traffic of its own
                      in forward and dgrad. Each rank's dA is the part of its outputs, summed by finish_gradients.
    row-parallel      A (r, K/R) Shard(1), B replicated; x A^T of r columns is summed over the ranks as x W^T is.

drop, in training alone, has masks that do not depend on the layout: by token and element in the residual stream's
layout; in a row-parallel layer, whose ranks have columns of their own, by token, block of BLOCK columns, place in it.
Then a column-parallel adapter's x is not that of W, and has collectives of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from megakern.config import require
from megakern.layers.dropout import DropoutKey, checked_key, drop_branch
from megakern.layers.parameter import Constant, Normal, add_parameter, local
from megakern.ops.dropout import dropout
from megakern.ops.linear import linear
from megakern.parallel.blocks import local_of
from megakern.parallel.context import ParallelContext

TARGETS = {"qkv": ("qkv",), "proj": ("proj",), "fc": ("fc1", "gate", "up", "fc2")}
"""What can be adapted, and the names of those linear layers."""

BLOCK = 8
"""Columns that share a row of a dropout mask in row-parallel layers; a rank has whole blocks."""


def mask_blocks(site: str, in_features: int, tp: int) -> int:
    """Blocks of a mask of what a row-parallel layer reads. Raises ConfigError where tp cuts through one."""
    block = math.gcd(in_features, BLOCK)
    blocks = in_features // block
    require(
        blocks % tp == 0,
        f"lora.dropout: {site} reads {in_features} columns, which parallel.tp = {tp} does not split into whole blocks "
        f"of {block}; use a tp that divides {blocks}, or lora.dropout = 0",
    )
    return blocks


class LowRank(nn.Module):
    """The adapter of one linear layer. `forward(h, y)`: h = drop(x) A^T (..., r), y = x W^T + b -> y + s h B^T.

    `site` names its masks. Raises ConfigError as `mask_blocks` does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        row_parallel: bool,
        parallel: ParallelContext,
        dropout: float = 0.0,
        site: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scale, self.row_parallel, self.dropout, self.site = scale, row_parallel, dropout, f"lora.{site}"
        if dropout and row_parallel:
            self.blocks = mask_blocks(site, in_features, parallel.tp_size)
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

    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def dropped(self, x: torch.Tensor, key: DropoutKey | None) -> torch.Tensor:
        """What A reads: x, or in training drop(x) (B, T, K), this rank's tokens or columns of it.

        Raises ValueError where there are masks to make and no key.
        """
        key = checked_key(key, self.dropout, self.training)
        if key is None:
            return x
        if not self.row_parallel:
            return drop_branch(x, self.dropout, key, self.site, self.region)
        B, T, K = x.shape
        own = self.blocks // self.region.size
        first = key.first_sample * T * self.blocks + self.region.rank * own
        rows = x.reshape(B, T, own, K // own)
        how = {"row_offset": first, "row_blocks": (own, self.blocks)}
        return dropout(rows, self.dropout, key.seed_of(self.site), **how).view(B, T, K)

    @torch.no_grad()
    def merge_into(self, weight: torch.Tensor) -> None:
        """Adds s B A to the layer's weight, a rank's slice each; computed in fp32, rounded once."""
        shard, a, b = (local_of(tensor) for tensor in (weight, self.a, self.b))
        wide = torch.float64 if shard.dtype == torch.float64 else torch.float32
        shard.copy_(shard.to(wide) + self.scale * (b.to(wide) @ a.to(wide)))


def add_adapters(
    model: nn.Module,
    parallel: ParallelContext,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
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
                dropout=dropout,
                site=path.rpartition(".")[2],
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
