"""The keys and values of past tokens, for every layer of a model, in memory that is allocated once."""

from __future__ import annotations

import torch

from megakern.config import GPTConfig
from megakern.layers.attention import LayerCache
from megakern.parallel.context import ParallelContext


class KVCache:
    """Per layer keys and values (batch, capacity, G/R, D): 2 L batch capacity (G/R) D elements in all.

    Give it to `GPT.forward` under `torch.no_grad()`; each call appends its tokens. Raises ValueError when the capacity
    is above the model's sequence length.
    """

    def __init__(
        self,
        config: GPTConfig,
        parallel: ParallelContext | None = None,
        *,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if capacity > config.sequence_length:
            raise ValueError(
                f"cache: capacity of {capacity} tokens is above the model's sequence_length of {config.sequence_length}"
            )
        kv_heads = (parallel or ParallelContext()).shard(config.key_value_heads, "kv_heads")
        self.layers = [
            LayerCache(batch, capacity, kv_heads, config.size_of_head, device=device, dtype=dtype)
            for _ in range(config.layers)
        ]

    @property
    def length(self) -> int:
        """Tokens in the cache, the same for each layer between calls."""
        return self.layers[0].length
