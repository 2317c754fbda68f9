"""What ranks agree on once a step. No device needed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from megakern.train.agreement import DivergedError, Outcome, agree


@pytest.mark.parametrize("norm", [0.5, math.inf, math.nan])
def test_one_process_agrees_with_itself(norm):
    outcome = agree(torch.tensor(1.25), torch.tensor(norm), 12, ParallelContext())
    assert (outcome.loss, outcome.finite, outcome.signal) == (1.25, norm == 0.5, 12)
    assert outcome.norm == norm or math.isnan(norm)


def outcome_after(shapes: tuple[tuple[int, ...], ...], norms: tuple[float, ...], folder: str) -> Outcome | str:
    """Rank r records an all-reduce of shapes[r] in this step; what they agree on."""
    rank = dist.get_rank()
    trace.start(Path(folder) / f"rank-{rank}", rank, dist.get_world_size())
    try:
        trace.begin_step(0)
        trace.collective("all_reduce", torch.empty(shapes[rank]), None)
        parallel = ParallelContext.create(tp=dist.get_world_size())
        return agree(torch.tensor(1.0 + rank), torch.tensor(norms[rank]), 10 + rank, parallel)
    except DivergedError as error:
        return str(error)
    finally:
        trace._recorder = None


def test_ranks_agree_and_refuse_other_collectives(ranks, tmp_path):
    same = ((4, 8), (4, 8))
    for rank, outcome in enumerate(ranks.run(outcome_after, 2, same, (0.5, 0.75), str(tmp_path))):
        assert outcome == Outcome(loss=1.5, norm=(0.5, 0.75)[rank], finite=True, signal=11)
    for rank, outcome in enumerate(ranks.run(outcome_after, 2, same, (0.5, math.inf), str(tmp_path))):
        assert outcome == Outcome(loss=1.5, norm=(0.5, math.inf)[rank], finite=False, signal=11)
    for said in ranks.run(outcome_after, 2, ((4, 8), (8, 4)), (0.5, 0.5), str(tmp_path)):
        assert "have not made the same collectives in this step" in said
