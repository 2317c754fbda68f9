"""The attention half of a block, whole key-value groups a rank.

Letters: B batch, T new tokens, S keys, C channels, H query heads, G key-value heads, n = H/G, D head dim, R ranks.

    qkv    (B, T, G/R, n + 2, D) = f(x) qkv^T + b    weight (G (n + 2) D / R, C); the rows of a group are [q .. q, k, v]
    q      (B, T, H/R, D)   k, v (B, T, G/R, D)      qk_norm: RMSNorm of each head of q and k, weights (D,) replicated
    o      (B, T, H/R, D) = attention(rope(q), rope(k), v)
    y      (B, T, C) = g(o proj^T) + b               weight (C, H D / R)

    forward: one all-reduce (B, T, C) in g. dgrad: one all-reduce (B, T, C) in f. wgrad: no traffic; each rank's heads
    give a partial gradient of the qk_norm weights, which finish_gradients sums once a step.
    Under sequence parallelism x and y are (B, T/R, C); forward: an all-gather in f, a reduce-scatter in g; backward: an
    all-gather of dy, another of x, a reduce-scatter of dx.
    Saved: x (its shard), q, k, v after rope (with qk_norm: qkv too), o and the log-sum-exp (B, H/R, T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megakern.layers.cache import LayerCache
from megakern.layers.dropout import DropoutKey, checked_key
from megakern.layers.hooks import watched
from megakern.layers.linear import ColumnParallelLinear, RowParallelLinear
from megakern.layers.norm import RMSNorm
from megakern.layers.recompute import run_again
from megakern.ops.attention import attention, attention_qkv
from megakern.ops.rope import rope as apply_rope
from megakern.parallel.context import ParallelContext


class ParallelAttention(nn.Module):
    """Causal self-attention with fused qkv; H and G are whole-model numbers, each rank has H/R and G/R.

    `forward(x, *, residual, rope, positions, cache, cu_seqlens, dropout_key)`: x (B, T, C) -> (B, T, C), plus residual
    when given (all three (B, T/R, C) under sequence parallelism; positions are of all T tokens always);
    rope (cos, sin) of mk.rope, positions (T,) or (B, T); with a cache the keys are its past and x's own,
    and there is no dropout.
    cu_seqlens (n B + 1,) int32: offsets in the B T tokens of n documents a row, which do not see each other; rows with
    fewer end with empty ones, and dropout takes document j of sample b for sample n b + j.
    `window`: a token sees itself and this many before it. `dropout` is that of the probabilities. `recompute_core`:
    keep qkv and o alone, and compute what lies between again in backward.
    Raises ValueError when tp does not divide `kv_heads`, and for dropout in training without a key.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: int | None = None,
        dropout: float = 0.0,
        recompute_core: bool = False,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and width % heads:
            raise ValueError(f"attention: width = {width} is not divisible by heads = {heads}; pass head_dim")
        self.head_dim = width // heads if head_dim is None else head_dim
        if heads % kv_heads:
            raise ValueError(f"attention: heads = {heads} is not divisible by kv_heads = {kv_heads}")
        self.region, self.dropout = parallel.tensor_region, dropout
        self.recompute_core = recompute_core
        self.window = None if window is None else (window, 0)
        self.kv_heads = parallel.shard(kv_heads, "kv_heads")
        self.heads = self.kv_heads * (heads // kv_heads)
        self.first_head = parallel.tp_rank * self.heads
        how = {"parallel": parallel, "device": device, "dtype": dtype}
        self.qkv = ColumnParallelLinear(
            width,
            (heads + 2 * kv_heads) * self.head_dim,
            bias=bias if qkv_bias is None else qkv_bias,
            init_std=init_std,
            **how,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps, per_rank=True, **how) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps, per_rank=True, **how) if qk_norm else None
        self.proj = RowParallelLinear(
            heads * self.head_dim,
            width,
            bias=bias,
            init_std=init_std if output_init_std is None else output_init_std,
            **how,
        )

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window[0]}"
        return f"heads={self.heads}, kv_heads={self.kv_heads} of this rank, head_dim={self.head_dim}{window}"

    def forward(
        self,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        key = checked_key(dropout_key, self.dropout, self.training)
        qkv = self.qkv(x, dropout_key=dropout_key)
        if self.recompute_core:
            o = run_again(self._core, qkv, rope, positions, cache, cu_seqlens, key)
        else:
            o = self._core(qkv, rope, positions, cache, cu_seqlens, key)
        return self.proj(o, residual, dropout_key=dropout_key)

    def _core(self, qkv, rope, positions, cache: LayerCache | None, cu_seqlens, key: DropoutKey | None) -> torch.Tensor:
        """qkv (B, T, G (n + 2) D / R) -> o (B, T, H D / R)."""
        B, T, _ = qkv.shape
        n = self.heads // self.kv_heads
        rows = qkv.view(B, T, self.kv_heads, n + 2, self.head_dim)
        how = self._how(key)
        if n == 1 and self.q_norm is None and rope is None and cache is None and cu_seqlens is None:
            return attention_qkv(rows, **how).view(B, T, -1)
        q, k, v = rows.split((n, 1, 1), dim=3)  # one concatenation in the backward
        k, v = k.squeeze(3), v.squeeze(3)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(B, T, self.heads, self.head_dim)
        if rope is not None:
            # Nobody else holds what the norms made.
            own = self.q_norm is not None and not torch.is_grad_enabled() and not watched(self.q_norm, self.k_norm)
            q, k = apply_rope(q, k, *rope, positions=positions, in_place=own)
        if qkv.requires_grad and self.q_norm is None and (rope is not None or n > 1):
            k, v = k.contiguous(), v.contiguous()  # a view would keep all of qkv for backward, beside the new q
        if cache is not None:
            return cache.attend(q, k, v, self.window).view(B, T, -1)
        if cu_seqlens is not None:
            q, k, v = (x.reshape(B * T, *x.shape[2:]) for x in (q, k, v))
            first_sample, first_head = how["dropout_offset"]
            how["dropout_offset"] = (first_sample * ((len(cu_seqlens) - 1) // B), first_head)
            how["cu_seqlens"] = (cu_seqlens, cu_seqlens)
        return attention(q, k, v, **how).view(B, T, -1)

    def _how(self, key: DropoutKey | None) -> dict[str, Any]:
        """Options of the attention op."""
        drops = {} if key is None else {"dropout_p": self.dropout, "seed": key.seed_of("attention")}
        offset = (0, 0) if key is None else (key.first_sample, self.first_head)
        # deterministic: a resumed run goes on bit for bit
        return {"causal": True, "window": self.window, "dropout_offset": offset, "deterministic": True, **drops}
