"""Token and position embeddings, and the output head with its loss, with the vocabulary split over tp.

Letters: V vocabulary, P = V rounded up to `vocab_multiple`, the same under every layout; R ranks; rank r owns rows
[r P/R, (r + 1) P/R). f is what enters a tensor-parallel region, g what leaves it (region.py).

    VocabParallelEmbedding, weight (P/R, C)
    forward   y (B, T, C) = g(weight[token - r P/R], zero where the token is another rank's)    all-reduce (B, T, C)
    wgrad     rows of g'(dy) added up by token                                                   no traffic
    saved     tokens

    vocab_parallel_loss, weight (P/R, C)
    forward   loss of f(x) weight^T against targets           all-reduces of (B T) in linear_cross_entropy
    dgrad     dx (B, T, C) = f'(dlogits weight)               all-reduce (B, T, C)
    wgrad     dweight (P/R, C) = dlogits^T x                  no traffic

Under sequence parallelism y and x are a rank's own tokens, (B, T/R, C); tokens and targets are all of them, on every
rank. The embedding reduce-scatters and its backward all-gathers; the loss all-gathers x and its dgrad reduce-scatters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megakern.layers.parallel_linear import column_parallel_linear
from megakern.layers.parameter import Normal, add_parameter, initialize_standalone, local
from megakern.ops.gradients import target_of
from megakern.ops.linear_cross_entropy import linear_cross_entropy
from megakern.parallel.collectives import gather_from_tensor_parallel
from megakern.parallel.context import ParallelContext


class _WideLookUp(torch.autograd.Function):
    """Rows of a narrow weight, whose gradient is summed in another dtype: a token that comes often loses nothing."""

    @staticmethod
    def forward(ctx, indices, weight, dtype):
        ctx.rows, ctx.dtype = weight.shape[0], dtype
        ctx.save_for_backward(indices)
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dy.to(ctx.dtype), indices, ctx.rows, -1, False), None


def _look_up(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """indices (...) int64, weight (V, C) -> (..., C); the gradient of weight in its `GradientTarget`'s dtype."""
    dtype = target_of(weight).dtype
    return F.embedding(indices, weight) if dtype == weight.dtype else _WideLookUp.apply(indices, weight, dtype)


class VocabParallelEmbedding(nn.Module):
    """Token embedding: weight (P, C) as Shard(0), P = vocab_size rounded up to `vocab_multiple`; padding rows are zero.

    `forward(tokens)`: tokens (...) int64, the same on every rank -> (..., C) on every rank, or that of the rank's
    own tokens under sequence parallelism, in the weight's dtype.
    Raises ValueError when tp does not divide P, and (on a CPU) for a token outside [0, vocab_size).
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        vocab_multiple: int = 128,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.region, self.vocab_size = parallel.tensor_region, vocab_size
        padded = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.first_row = parallel.tp_rank * parallel.shard(padded, "padded vocab_size")
        initializer = Normal(init_std, rows=vocab_size)
        add_parameter(self, "weight", (padded, width), initializer, parallel, shard=0, device=device, dtype=dtype)
        initialize_standalone(self)

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"{self.vocab_size}, {width}, rows={rows}" + (f", tp={self.region.size}" if self.region.size > 1 else "")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self._check(tokens)
        weight = local(self.weight)
        if self.region.group is None:
            return _look_up(tokens, weight)
        row = tokens - self.first_row
        others = (row < 0) | (row >= weight.shape[0])
        rows = _look_up(row.masked_fill(others, 0), weight)
        return self.region.leave(rows.masked_fill(others.unsqueeze(-1), 0.0))

    def _check(self, tokens: torch.Tensor) -> None:
        # A split vocabulary would turn a wrong token into a row of zeros in silence. Elsewhere than on a CPU, looking
        # at the values would stop the device's queue.
        if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling() or is_fake(tokens):
            return
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"embedding: tokens must be in [0, {self.vocab_size}), got {low if low < 0 else high}; "
                f"use the tokenizer this model was made for"
            )


class PositionEmbedding(nn.Module):
    """Learned positions: weight (T, C), replicated.

    `forward(positions)`: (T,) or (B, T) int64 of all tokens -> (..., C), or that of the rank's own tokens.
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        parallel: ParallelContext | None = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        parallel = parallel or ParallelContext()
        self.region = parallel.tensor_region
        add_parameter(self, "weight", (length, width), Normal(init_std), parallel, device=device, dtype=dtype)
        initialize_standalone(self)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        own = self.region.own_tokens(positions, -1)
        return _look_up(own, local(self.weight, partial=self.region.shards_sequence))


def vocab_parallel_logits(
    x: torch.Tensor, weight: torch.Tensor, *, vocab_size: int, parallel: ParallelContext
) -> torch.Tensor:
    """x (..., C), weight (P, C) as Shard(0) -> logits (..., V) on every rank, padding cut off, in x's dtype."""
    region = parallel.tensor_region
    (logits,) = column_parallel_linear(x, [(local(weight), None)], region)
    return gather_from_tensor_parallel(logits, region.group)[..., :vocab_size]


def vocab_parallel_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    parallel: ParallelContext,
    reduction: str = "mean",
) -> torch.Tensor:
    """x (..., C), weight (P, C) as Shard(0), targets (...) int64, -100 ignored -> fp32 loss, the same on every rank.

    The logits are never held as a whole.
    """
    region = parallel.tensor_region
    return linear_cross_entropy(
        region.enter(x),
        local(weight),
        targets,
        reduction=reduction,
        group=region.group,
        vocab_size=vocab_size,
    )
