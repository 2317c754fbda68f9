"""The decoder-only transformer: embedding, blocks, final norm, vocabulary-parallel head and loss.

    hidden (B, T, C) = drop(embedding(tokens) + positions)        in the compute dtype, the same on every tp rank; or
                                                                  (B, T/R, C) under sequence parallelism
    hidden = block(hidden), L times
    loss = mean over (B, T) of cross entropy(norm(hidden) head^T, targets)      in fp32

The logits are never held as a whole when there are targets. The head is the token embedding when tied. Every initial
weight and every dropout mask is a function of a seed and logical indices, so that all layouts compute the same numbers
to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megakern.config import RECOMPUTE_DEFAULT, GPTConfig
from megakern.layers.block import TransformerBlock, make_norm
from megakern.layers.dropout import DropoutKey, checked_key, drop_branch
from megakern.layers.embedding import (
    PositionEmbedding,
    VocabParallelEmbedding,
    vocab_parallel_logits,
    vocab_parallel_loss,
)
from megakern.layers.parameter import initialize
from megakern.layers.recompute import chosen_modules, run_again
from megakern.model.cache import KVCache
from megakern.ops.memory import use_huge_pages
from megakern.parallel.blocks import local_of
from megakern.parallel.context import ParallelContext


def rope_tables(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position x frequency, (T, D/2) fp32 each, computed in fp64 (arXiv 2104.09864).

    Scaling "linear" divides every frequency by the factor; "llama3" only the slow ones, blending in between.
    """
    D = config.size_of_head
    frequency = config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    scaling = config.rope_scaling
    if scaling is not None:
        kept = torch.zeros_like(frequency)  # 1: stays, 0: divided by the factor
        if scaling.kind == "llama3":
            turns = scaling.original_length * frequency / (2 * math.pi)  # within the original length
            kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            kept = kept.clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = torch.outer(torch.arange(config.sequence_length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


class GPT(nn.Module):
    """A GPT of shape `config`, split over `parallel`'s tp ranks.

    seed           of the initial weights
    device         None: the context's own; "meta": shapes only, until `materialize`
    dtype          of the parameters
    compute_dtype  of the activations; None: `dtype`
    recompute      "none"; "full": blocks keep only their input and run again in backward; or "selective"
    recompute_modules   what "selective" computes again: some of "attention", "mlp" and "norm" (layers/recompute.py)

    Raises ConfigError when the model cannot be split, ValueError for another `recompute` or module.
    """

    def __init__(
        self,
        config: GPTConfig,
        parallel: ParallelContext | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        recompute: str = "none",
        recompute_modules: tuple[str, ...] = RECOMPUTE_DEFAULT,
    ):
        super().__init__()
        modules = chosen_modules(recompute, recompute_modules)
        parallel = parallel or ParallelContext()
        config.check_tensor_parallel(parallel.tp_size)
        self.config, self.parallel, self.recompute = config, parallel, recompute
        self.region = parallel.tensor_region
        self.compute_dtype = compute_dtype or dtype
        how = {"parallel": parallel, "device": "meta", "dtype": dtype}
        vocabulary = {"vocab_multiple": config.vocab_multiple, "init_std": config.init_std, **how}
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.width, **vocabulary)
        self.positions = None
        if config.positions == "learned":
            self.positions = PositionEmbedding(config.sequence_length, config.width, init_std=config.init_std, **how)
        blocks = [TransformerBlock(config, index, recompute=modules, **how) for index in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config, **how)
        self.head = None  # an embedding used backwards: only its weight is read
        if not config.tied_embeddings:
            self.head = VocabParallelEmbedding(config.vocab_size, config.width, **vocabulary)
        if config.positions == "rope":
            shape = (config.sequence_length, config.size_of_head // 2)
            for name in ("rope_cos", "rope_sin"):
                self.register_buffer(name, torch.empty(shape, device="meta"), persistent=False)
        device = parallel.device() if device is None else torch.device(device)
        if device.type != "meta":
            self.materialize(device, seed=seed)

    def materialize(self, device: torch.device | str, *, seed: int) -> None:
        """Allocate everything on `device` and fill it: what a model made on "meta" needs, also after `fully_shard`."""
        self.to_empty(device=device)
        use_huge_pages(local_of(parameter) for parameter in self.parameters())  # as good without: only slower to read
        initialize(self, seed)
        if self.config.positions == "rope":
            cos, sin = rope_tables(self.config)
            self.rope_cos.copy_(cos)
            self.rope_sin.copy_(sin)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
        reduction: str = "mean",
        last_only: bool = False,
    ) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V), or with targets (B, T) int64 (-100 ignored) the fp32 loss.

        positions (T,) or (B, T) int; None: 0 .. T-1, with a cache those of its new tokens. cu_seqlens (n B + 1,) int32:
        rows hold n documents each, which do not see each other and have positions of their own; `ParallelAttention` has
        more. dropout_key is required where dropout is on. reduction: "mean" over targets that count, "sum" or "none".
        last_only: logits (B, 1, V) of the last.
        After the last backward of a step call `mk.finish_gradients(model.parameters())` (a no-op on one rank).
        Raises ValueError for sequences longer than the model's, other shapes, a cache while gradients are recorded, or
        (sequence parallelism, while gradients are recorded) a T that tp does not divide.
        """
        self._check(tokens, targets, positions, cache, last_only)
        if cu_seqlens is not None:
            _check_documents(tokens, cu_seqlens, cache)
            positions = _restarting(tokens, cu_seqlens) if positions is None else positions
        positions = cache.positions if positions is None and cache is not None else positions
        key = checked_key(dropout_key, self.config.dropout, self.training)
        hidden = self._embed(tokens, positions, key)
        rope = None
        if self.config.positions == "rope":
            rope = (self.rope_cos, self.rope_sin)
        for index, block in enumerate(self.blocks):
            how = {"rope": rope, "positions": positions, "cu_seqlens": cu_seqlens, "dropout_key": dropout_key}
            if self.recompute == "full" and cache is None:
                hidden = run_again(block, hidden, **how)
            else:
                hidden = block(hidden, cache=None if cache is None else cache.layers[index], **how)
        hidden = self.norm(hidden[:, -1:] if last_only else hidden)
        weight = self.embedding.weight if self.head is None else self.head.weight
        how = {"vocab_size": self.config.vocab_size, "parallel": self.parallel}
        if targets is None:
            return vocab_parallel_logits(hidden, weight, **how)
        return vocab_parallel_loss(hidden, weight, targets, reduction=reduction, **how)

    def _embed(self, tokens, positions, key: DropoutKey | None) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if self.positions is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            hidden = hidden + self.positions(positions)
        hidden = hidden.to(self.compute_dtype)
        return hidden if key is None else drop_branch(hidden, self.config.dropout, key, "embedding", self.region)

    def _check(self, tokens, targets, positions, cache, last_only: bool) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"GPT: tokens must be (B, T) int64, got {tuple(tokens.shape)} {tokens.dtype}")
        B, T = tokens.shape
        if self.config.sequence_length < T:
            raise ValueError(
                f"GPT: {T} tokens are more than the model's sequence_length of {self.config.sequence_length}; "
                f"cut the text, or use a model with longer sequences"
            )
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            raise ValueError(
                f"GPT: targets must be (B, T) = ({B}, {T}) int64 like tokens, "
                f"got {tuple(targets.shape)} {targets.dtype}"
            )
        if targets is not None and last_only:
            raise ValueError("GPT: last_only is for logits; leave it out when targets are given")
        if last_only and self.region.shards_sequence:
            raise ValueError("GPT: last_only is for generation; with sequence_parallel, call it under torch.no_grad()")
        if positions is not None and tuple(positions.shape) not in ((T,), (B, T)):
            raise ValueError(
                f"GPT: positions must be (T,) = ({T},) or (B, T) = ({B}, {T}), got {tuple(positions.shape)}"
            )
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("GPT: a cache is for generation; call the model under torch.no_grad()")
        if cache is not None and cache.shape != (B, T):
            raise ValueError(f"GPT: the cache was made for tokens of shape {cache.shape}, got {(B, T)}")


def _check_documents(tokens: torch.Tensor, cu_seqlens: torch.Tensor, cache: KVCache | None) -> None:
    B, T = tokens.shape
    if cache is not None:
        raise ValueError("GPT: cu_seqlens is for training and scoring; leave the cache out")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2 or (len(cu_seqlens) - 1) % B:
        raise ValueError(
            f"GPT: cu_seqlens must be (n B + 1,) int32, n documents for each of B = {B} rows, got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; end rows that have fewer with empty documents"
        )
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens[:: (len(cu_seqlens) - 1) // B].tolist()
        if ends != list(range(0, B * T + 1, T)):
            raise ValueError(f"GPT: in cu_seqlens a document must start where each row of T = {T} does, got {ends}")


def _restarting(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(B, T): the place of each token in its document."""
    place = torch.arange(tokens.numel(), device=tokens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return (place - cu_seqlens[document]).view_as(tokens).long()


def parameter_count(model: GPT | GPTConfig, *, padding: bool = False) -> int:
    """Parameters of the whole model, whatever the layout; with `padding` the vocabulary's padding rows count too."""
    if isinstance(model, GPTConfig):
        model = GPT(model, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    tables = 1 if config.tied_embeddings else 2
    return count if padding else count - tables * (config.padded_vocab_size - config.vocab_size) * config.width
