"""Which random numbers a dropout site uses: a function of (seed, step, layer, site, logical index), not of the layout.

Sites: "embedding", "attention" (the probabilities), "attention_output", "mlp_output". In the residual stream the
logical index is (row in the whole batch, channel); in attention (sample in the whole batch, head of all heads, query,
key).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megakern.ops.dropout import dropout
from megakern.parallel.random import fold
from megakern.parallel.region import TensorRegion


@dataclass(frozen=True)
class DropoutKey:
    """One micro-batch of one step. Equal keys give equal masks, so a recomputed or resumed step is the same step."""

    seed: int
    step: int
    first_sample: int = 0
    """Index of this micro-batch's first sample in the whole batch of the step."""
    layer: int = -1
    """Block the key is for; -1 outside the blocks."""

    def at_layer(self, layer: int) -> DropoutKey:
        return dataclasses.replace(self, layer=layer)

    def seed_of(self, site: str) -> int:
        return fold(self.seed, self.step, self.layer, site)


def checked_key(key: DropoutKey | None, p: float, training: bool) -> DropoutKey | None:
    """`key` when dropout is on (training and p > 0), else None. Raises ValueError when it is on and there is no key."""
    if not training or p == 0:
        return None
    if key is None:
        raise ValueError(
            f"dropout = {p} in training mode needs a dropout_key, got None; "
            f"pass dropout_key=DropoutKey(seed, step, first_sample), or call .eval()"
        )
    return key


def drop_branch(
    x: torch.Tensor,
    p: float,
    key: DropoutKey,
    site: str,
    region: TensorRegion,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + dropout(x), x (B, T, C), or (B, T/R, C) where `region` shards the sequence.

    The mask of token t of sample b is that of logical row (first_sample + b) T + t under every layout.
    """
    tokens = x.shape[1]
    if not region.shards_sequence:
        return dropout(x, p, key.seed_of(site), row_offset=key.first_sample * tokens, residual=residual)
    T = tokens * region.size
    offset = key.first_sample * T + region.rank * tokens
    return dropout(x, p, key.seed_of(site), row_offset=offset, row_blocks=(tokens, T), residual=residual)
