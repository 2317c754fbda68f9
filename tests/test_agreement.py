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
    outcome = agree(torch.tensor(1.25), torch.tensor(norm), ParallelContext(), signal=12, written=False)
    assert (outcome.loss, outcome.finite, outcome.signal, outcome.written) == (1.25, norm == 0.5, 12, False)
    assert outcome.norm == norm or math.isnan(norm)


def outcome_after(
    shapes: tuple[tuple[int, ...], ...], norms: tuple[float, ...], written: tuple[bool, ...], folder: str
) -> Outcome | str:
    """Rank r records an all-reduce of shapes[r] in this step; what they agree on."""
    rank = dist.get_rank()
    trace.start(Path(folder) / f"rank-{rank}", rank, dist.get_world_size())
    try:
        trace.begin_step(0)
        trace.collective("all_reduce", torch.empty(shapes[rank]), None)
        parallel = ParallelContext.create(tp=dist.get_world_size())
        more = {"signal": 10 + rank, "written": written[rank]}
        return agree(torch.tensor(1.0 + rank), torch.tensor(norms[rank]), parallel, **more)
    except DivergedError as error:
        return str(error)
    finally:
        trace._recorder = None


@pytest.mark.parametrize("norms", [(0.5, 0.75), (0.5, math.inf)])
@pytest.mark.parametrize("written", [(True, True), (True, False)])
def test_ranks_agree(ranks, tmp_path, norms, written):
    for rank, outcome in enumerate(ranks.run(outcome_after, 2, ((4, 8), (4, 8)), norms, written, str(tmp_path))):
        together = {"finite": max(norms) < math.inf, "written": all(written)}
        assert outcome == Outcome(loss=1.5, norm=norms[rank], signal=11, **together)


def test_other_collectives_are_refused(ranks, tmp_path):
    for said in ranks.run(outcome_after, 2, ((4, 8), (8, 4)), (0.5, 0.5), (True, True), str(tmp_path)):
        assert "have not made the same collectives in this step" in said
