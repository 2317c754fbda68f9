"""One transformer block, pre-norm. h (B, T, C) is the residual stream, the same on every tp rank.

    sequential   h = h + drop(attention(norm1(h)));  h = h + drop(mlp(norm2(h)))
    parallel     h = h + drop(attention(norm1(h))) + drop(mlp(norm1(h)))        (GPT-J; there is no norm2)

Each half has one all-reduce forward and one backward under tensor parallelism. Under sequence parallelism h is
(B, T/R, C): a half has an all-gather and a reduce-scatter forward, two and one backward; norms and dropout work on a
rank's own tokens, dropout with the masks of the whole. Where nothing is dropped the residual is
added by the half's last linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from megakern.config import GPTConfig
from megakern.layers.attention import ParallelAttention
from megakern.layers.cache import LayerCache
from megakern.layers.dropout import DropoutKey, checked_key, drop_branch
from megakern.layers.hooks import watched
from megakern.layers.mlp import ParallelMLP
from megakern.layers.norm import LayerNorm, RMSNorm
from megakern.layers.recompute import made_again, run_again
from megakern.ops.block_step import BlockWeights, Pages, block_step
from megakern.parallel.context import ParallelContext


def make_norm(config: GPTConfig, parallel: ParallelContext, *, device=None, dtype=None) -> LayerNorm | RMSNorm:
    """The norm that the config names, of the residual stream's width."""
    how = {"eps": config.norm_eps, "parallel": parallel, "device": device, "dtype": dtype}
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, **how)
    return LayerNorm(config.width, bias=config.bias, **how)


def _parameters(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    table = layer._parameters  # at a tenth of what nn.Module's attributes cost, and a step reads them by the dozen
    return table["weight"], table.get("bias")


class TransformerBlock(nn.Module):
    """Block `index` of the model that `config` describes.

    `forward(hidden, *, rope, positions, cache, cu_seqlens, dropout_key)`: hidden (B, T, C) -> (B, T, C), both
    (B, T/R, C) under sequence parallelism; the keywords are those of `ParallelAttention`.
    `recompute`: names of config.RECOMPUTE_MODULES that are computed again in backward.
    Raises ConfigError when the model cannot be split over tp.
    """

    def __init__(
        self,
        config: GPTConfig,
        index: int = 0,
        parallel: ParallelContext | None = None,
        *,
        recompute: frozenset[str] = frozenset(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        config.check_tensor_parallel(parallel.tp_size)
        self.recompute = recompute
        self.index, self.dropout, self.region = index, config.dropout, parallel.tensor_region
        how = {"device": device, "dtype": dtype}
        shared = {
            "bias": config.bias,
            "parallel": parallel,
            "init_std": config.init_std,
            "output_init_std": config.init_std / math.sqrt(2 * config.layers),
            **how,
        }
        self.norm1 = make_norm(config, parallel, **how)
        self.attention = ParallelAttention(
            config.width,
            config.heads,
            kv_heads=config.key_value_heads,
            head_dim=config.size_of_head,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            window=config.window,
            dropout=config.dropout,
            recompute_core="attention" in recompute,
            **shared,
        )
        self.norm2 = None if config.parallel_residual else make_norm(config, parallel, **how)
        self.mlp = ParallelMLP(config.width, config.size_of_ffn, activation=config.activation, **shared)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        key = checked_key(dropout_key, self.dropout, self.training)
        if cache is not None and key is None and (made := self._step(hidden, rope, positions, cache)) is not None:
            return made
        own = None if dropout_key is None else dropout_key.at_layer(self.index)
        key = None if key is None else own

        def half(branch: Callable, x: torch.Tensor, residual: torch.Tensor, site: str, **arguments) -> torch.Tensor:
            if key is None:
                return branch(x, residual=residual, **arguments)
            return drop_branch(branch(x, **arguments), self.dropout, key, site, self.region, residual=residual)

        how = {"rope": rope, "positions": positions, "cache": cache, "cu_seqlens": cu_seqlens, "dropout_key": own}
        mlp = partial(run_again, self.mlp) if "mlp" in self.recompute else self.mlp
        normed, hidden, again = self._normed(self.norm1, hidden)
        with again:
            hidden = half(self.attention, normed, hidden, "attention_output", **how)
        if self.norm2 is not None:
            normed, hidden, again = self._normed(self.norm2, hidden)
        with again:
            return half(mlp, normed, hidden, "mlp_output", dropout_key=own)

    def _step(self, hidden, rope, positions, cache: LayerCache) -> torch.Tensor | None:
        """The whole block as one kernel, for a few new tokens; None where it is to run op by op."""
        places, attention, mlp = cache.places, self.attention, self.mlp
        own_positions = rope is None or positions is places.positions
        if self.region.group is not None or places.kept is not None or not own_positions or self.recompute:
            return None
        fc1, up = (mlp.gate, mlp.up) if mlp.gated else (mlp.fc1, None)
        linears = (attention.qkv, attention.proj, fc1, up, mlp.fc2)
        if torch.compiler.is_compiling() or any(each is not None and each.adapter is not None for each in linears):
            return None
        norms = (self.norm1, self.norm2, attention.q_norm, attention.k_norm)
        if watched(attention, mlp, *linears, *norms):
            return None
        weights = BlockWeights(
            *(None if each is None else _parameters(each) for each in (*norms, *linears)),
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            centre=isinstance(self.norm1, LayerNorm),
            activation="silu" if mlp.gated else fc1.activation or "",
            window=None if attention.window is None else attention.window[0],
            eps=self.norm1.eps,
            head_eps=0.0 if attention.q_norm is None else attention.q_norm.eps,
        )
        return block_step(
            hidden, weights, Pages(cache.keys, cache.values, places.block_table, places.lengths), rope, cache.kept
        )

    def _normed(
        self, norm: nn.Module, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, AbstractContextManager]:
        """norm(hidden), hidden, and the context in which to read the two."""
        normed, stream = (norm(hidden), hidden) if watched(norm) else norm.of_stream(hidden)
        again = made_again(normed, norm, hidden) if "norm" in self.recompute else nullcontext()
        return normed, stream, again
