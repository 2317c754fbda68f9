"""A layer's keys and values of past tokens, in pages that all sequences share, and attention over them.

Letters: B sequences, T new tokens, G key-value heads, D head dim, R ranks, P pages of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megakern.ops.attention import attention
from megakern.ops.paged_attention import paged_attention


@dataclass(frozen=True)
class Places:
    """Where T new tokens of each of B sequences lie, the same for every layer.

    A sequence with fewer new tokens than T has them last; what stands before them is computed and kept nowhere.
    """

    block_table: torch.Tensor
    """(B, P) int32: page i of sequence b."""
    lengths: torch.Tensor
    """(B,) int32: tokens of sequence b, the new ones included."""
    slots: torch.Tensor
    """int64: row of the flattened pages for each new token, sequence after sequence."""
    kept: torch.Tensor | None
    """int64, like slots: which of the B T rows are these tokens. None: all."""
    positions: torch.Tensor
    """(B, T) int64: of each new token in its sequence."""
    whole: bool
    """Nothing is in the cache yet and every row is a token: attention needs to read nothing from the pages."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages, keys and values (pages, page_size, G/R, D), and the places of a batch in them."""

    keys: torch.Tensor
    values: torch.Tensor
    places: Places
    kept: dict
    """What kernels keep from one batch to the next."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int | None, int | None] | None
    ) -> torch.Tensor:
        """q (B, T, H/R, D), k, v (B, T, G/R, D) of the new tokens -> (B, T, H/R, D); k and v are in the pages then."""
        places = self.places
        for pages, new in ((self.keys, k), (self.values, v)):
            rows = new.flatten(0, 1)
            rows = rows if places.kept is None else rows[places.kept]
            pages.flatten(0, 1).index_copy_(0, places.slots, rows.to(pages.dtype))  # under autocast they may differ
        if places.whole:
            return attention(q, k, v, causal=True, window=window)
        return paged_attention(q, self.keys, self.values, places.block_table, places.lengths, window=window)
