"""The border of a tensor-parallel region: what a layer does to activations that enter and leave it.

Outside, the residual stream is (..., T, C) on every rank, or under sequence parallelism (..., T/R, C), rank r holding
tokens [r T/R, (r + 1) T/R) (arXiv 2205.05198). Inside, every rank has all tokens and its shard of the weights.

                 enter                            leave
    plain        f: identity / all-reduce         g: all-reduce / identity
    sequence     all-gather / reduce-scatter      reduce-scatter / all-gather         (forward / backward)

Sequence parallelism saves activation memory between forward and backward, so it acts while gradients are recorded;
under `torch.no_grad()` (evaluation, generation) the same layers take and give the plain layout, for any T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megakern.parallel.collectives import (
    copy_to_tensor_parallel,
    gather_sequence,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
    tokens_each,
)
from megakern.parallel.overlap import pieces_for


@dataclass(frozen=True)
class TensorRegion:
    """The tensor-parallel group (None: one rank) and the choices of `ParallelContext` that its layers follow."""

    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    overlap_rows: int | None = None
    fused_collectives: bool = False

    @property
    def shards_sequence(self) -> bool:
        """Is the residual stream sharded over time in this call?"""
        return self.sequence_parallel and torch.is_grad_enabled()

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def pieces(self, rows: int, device: torch.device) -> int:
        """Into how many pieces a sequence-parallel collective of `rows` rows a rank is cut."""
        return pieces_for(rows, self.overlap_rows, device)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream's layout -> (..., T, C), whose gradient is summed over the ranks."""
        return gather_sequence(x, self.group) if self.shards_sequence else copy_to_tensor_parallel(x, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Each rank's partial (..., T, C) -> their sum, in the residual stream's layout."""
        if self.shards_sequence:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_tensor_parallel(x, self.group)

    def own_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """A tensor with all tokens along `dim` -> this rank's tokens of it where the sequence is sharded, else x.

        For what is not differentiated, as positions. Raises ValueError when R does not divide their number.
        """
        if not self.shards_sequence:
            return x
        own = tokens_each(x.shape[dim], self.group)
        return x.narrow(dim, self.rank * own, own)
