"""What ranks tell each other once a step, and the one place of a step where the training loop waits for its device.

The ranks' numbers stay on the device until the gradients are made: then one all-gather of five float64 a rank and one
copy to the host say what the step was. So a GPU's queue runs empty once a step, and not once for each number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.collectives import all_gather_last
from megakern.parallel.context import ParallelContext


class DivergedError(RuntimeError):
    """The ranks of a run no longer do the same."""


@dataclass(frozen=True)
class Outcome:
    """Of a step, the same on all ranks but for `norm`."""

    loss: float
    """The mean over the ranks."""
    norm: float
    """Of the gradients, as this rank has it."""
    finite: bool
    """Is the norm finite on every rank? A replicated parameter has a gradient on each: one can be broken alone."""
    signal: int
    """The number of a signal that any rank has received, 0 for none."""
    written: bool
    """Has every rank written its part of the checkpoint that was staged? True where nothing is."""


def agree(
    loss: torch.Tensor, norm: torch.Tensor, parallel: ParallelContext, *, signal: int = 0, written: bool = True
) -> Outcome:
    """loss, norm: 0-d, of this rank, on one device; the outcome over all ranks.

    The same all-gather compares what collectives each rank has made in this step. gloo answers another shape on one
    rank with an abort, a time-out, or silently with garbage: this check stands before each update and each save, so
    that no garbage is kept. Raises DivergedError on every rank.
    """
    trace.phase("agreement on the step")
    numbers = (torch.full_like(loss, number, dtype=torch.float64) for number in (signal, written, trace.digest()))
    own = torch.stack([loss.double(), norm.double(), *numbers])
    told = all_gather_last(own, None if parallel.mesh is None else dist.group.WORLD).view(-1, 5).tolist()
    losses, norms, signals, all_written, digests = zip(*told, strict=True)
    if len(set(digests)) > 1:
        raise DivergedError(
            "the ranks have not made the same collectives in this step, so their sums may be garbage; nothing of this "
            "step is saved, go on from the newest checkpoint"
        )
    finite = all(math.isfinite(each) for each in norms)
    loss_of_all, own_norm = sum(losses) / len(losses), norms[parallel.world_rank]
    return Outcome(loss_of_all, own_norm, finite, int(max(signals)), all(all_written))
