"""Collectives and their adjoints, and the context. Two and four gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import megakern as mk
from megakern.parallel import collectives

OPERATORS = {
    # name: (dense function of the list of every rank's x, rank) -> that rank's output
    "copy_to_tensor_parallel": lambda xs, r: xs[r],
    "reduce_from_tensor_parallel": lambda xs, r: sum(xs),
    "gather_from_tensor_parallel": lambda xs, r: torch.cat(xs, -1),
    "scatter_to_tensor_parallel": lambda xs, r: xs[r].chunk(len(xs), -1)[r],
    "gather_sequence": lambda xs, r: torch.cat(xs, -2),
    "reduce_scatter_sequence": lambda xs, r: sum(xs).chunk(len(xs), -2)[r],
    "scatter_sequence": lambda xs, r: xs[r].chunk(len(xs), -2)[r],
}


def inputs_of(rank: int) -> torch.Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def run_operator(name: str) -> tuple:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = inputs_of(rank).requires_grad_()
    out = getattr(collectives, name)(x, dist.group.WORLD)
    weight = torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape) + 100 * rank
    (out * weight).sum().backward()
    return out.detach(), x.grad, size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operator_and_adjoint(ranks, name, size):
    results = ranks.run(run_operator, size, name)
    dense = OPERATORS[name]
    xs = [inputs_of(rank) for rank in range(size)]
    # In a tensor-parallel region the replicated side counts once: the adjoints follow the table of the module.
    weights = [
        torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape) + 100 * r
        for r, (out, _, _) in enumerate(results)
    ]
    adjoints = {
        "copy_to_tensor_parallel": lambda r: sum(weights),
        "reduce_from_tensor_parallel": lambda r: weights[r],
        "gather_from_tensor_parallel": lambda r: weights[r].chunk(size, -1)[r],
        "scatter_to_tensor_parallel": lambda r: torch.cat(weights, -1),
        "gather_sequence": lambda r: sum(weights).chunk(size, -2)[r],
        "reduce_scatter_sequence": lambda r: torch.cat(weights, -2),
        "scatter_sequence": lambda r: torch.cat(weights, -2),
    }
    for rank, (out, gradient, _) in enumerate(results):
        torch.testing.assert_close(out, dense(xs, rank), rtol=0, atol=1e-14)
        torch.testing.assert_close(gradient, adjoints[name](rank), rtol=0, atol=1e-12)


def describe_context() -> tuple:
    context = mk.ParallelContext.create(tp=2)
    return context.size("dp"), context.rank("dp"), context.tp_size, context.tp_rank, context.world_rank


def test_context_places_tp_neighbours(ranks):
    assert ranks.run(describe_context, 4) == [(2, 0, 2, 0, 0), (2, 0, 2, 1, 1), (2, 1, 2, 0, 2), (2, 1, 2, 1, 3)]


def refuse_context() -> str:
    with pytest.raises(ValueError, match="does not give the 2 processes that were started") as error:
        mk.ParallelContext.create(tp=4)
    return str(error.value)


def test_context_refuses_sizes_that_do_not_multiply(ranks):
    assert "start 4" in ranks.run(refuse_context, 2)[0]


def test_single_process_is_the_identity():
    context, x = mk.ParallelContext(), torch.ones(2)
    assert (context.tp_size, context.tp_rank, context.tp_group, context.world_size) == (1, 0, None, 1)
    assert all(getattr(collectives, name)(x, None) is x for name in OPERATORS)
    for size in ({"pp": 2}, {"cp": 2}):
        with pytest.raises(ValueError, match="pipeline and context parallel are not in this version: pp and cp are 1"):
            mk.ParallelContext.create(**size)
    with pytest.raises(ValueError, match="parallel sizes must be 1 or more"):
        mk.ParallelContext.create(tp=0)
