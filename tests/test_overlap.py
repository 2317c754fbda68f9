"""Collectives beside matrix products: the order of starts and waits, pieces against the whole, fused operators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

import megakern as mk
from megakern.layers import parallel_linear
from megakern.layers.dropout import DropoutKey
from megakern.parallel import collectives, context, overlap
from tests.ranks import through_gloo

B, T, C = 2, 20, 32  # ten tokens a rank make pieces of 3, 3, 3 and 1


def pieces_against_the_whole(shape: tuple[int, ...]) -> None:
    group, size = dist.group.WORLD, dist.get_world_size()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    weight = torch.randn(shape[-1], 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    whole = collectives.gather_sequence(x, group)
    for pieces in (1, 2, 4):
        same, product = overlap.gather_then(x, group, lambda rows: (rows, rows @ weight), pieces)
        assert torch.equal(same, whole), pieces
        torch.testing.assert_close(product, whole @ weight, rtol=1e-13, atol=1e-13)
    y = torch.cat([x] * size, -2)
    expected = collectives.reduce_scatter_sequence(y @ weight, group)
    for pieces in (1, 2, 4):
        out = overlap.then_reduce_scatter(y, group, lambda rows: rows @ weight, pieces)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(10, 6), (3, 10, 6), (2, 3, 5, 6), (3, 2, 6)], ids=str)
def test_pieces_give_the_whole(ranks, shape):
    ranks.run(pieces_against_the_whole, 2, shape)


def block_results(values: dict, choices: dict, fused: bool = False) -> tuple[list[str], dict]:
    """-> (names of the collectives of forward and backward, results by name) of a block in float64."""
    config = mk.GPTConfig(width=C, heads=8, layers=1, sequence_length=T, dropout=0.1, **values)
    seen: list[str] = []
    originals = collectives._all_gather_single, collectives._reduce_scatter_single, overlap._operators
    why_not = context.why_not_fused

    def watched(name, function):
        return lambda *inputs, **how: (seen.append(name), function(*inputs, **how))[1]

    collectives._all_gather_single = watched("gather", originals[0])
    collectives._reduce_scatter_single = watched("scatter", originals[1])
    if fused:  # torch's own functions, with the plain collectives that its test mode puts in place of the GPU's
        context.why_not_fused = lambda *_: None
        stand_in = SimpleNamespace(
            fused_all_gather_matmul=watched("fused gather", symmetric_memory._fused_all_gather_matmul),
            fused_matmul_reduce_scatter=watched("fused scatter", symmetric_memory._fused_matmul_reduce_scatter),
        )
        overlap._operators = lambda: stand_in
    try:
        torch.manual_seed(3)
        parallel = mk.ParallelContext.create(tp=2, sequence_parallel=True, **choices)
        through_gloo(parallel.tp_group)
        block = mk.TransformerBlock(config, 0, parallel, dtype=torch.float64)
        whole = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = collectives.scatter_sequence(whole, parallel.tp_group).requires_grad_()
        with symmetric_memory._test_mode():
            y = block(x, dropout_key=DropoutKey(1, 1))
            (y * y).sum().backward()
    finally:
        collectives._all_gather_single, collectives._reduce_scatter_single, overlap._operators = originals
        context.why_not_fused = why_not
    mk.finish_gradients(block.parameters())
    gradients = {name: parameter.grad.to_local() for name, parameter in block.named_parameters()}
    return seen, {"y": y.detach(), "dx": x.grad, **gradients}


VALUES = {"gpt2": {}, "llama": {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "kv_heads": 4}}
WHOLE = ["gather", "scatter"] * 2 + ["gather", "gather", "scatter"] * 2
HALF = ["gather"] * 4 + ["scatter"] * 4
CUT = (
    HALF * 2 + [*["gather"] * 4, "gather", "scatter"] * 2
)  # dy in pieces; x and dx have work beside them, and stay whole


@pytest.mark.parametrize("name", VALUES)
def test_a_block_in_pieces_is_the_same_block(ranks, name):
    wholes = ranks.run(block_results, 2, VALUES[name], {"overlap_rows": B * T // 2 + 1})
    for (seen, expected), (cut, results) in zip(
        wholes, ranks.run(block_results, 2, VALUES[name], {"overlap_rows": 20}), strict=True
    ):
        assert seen == WHOLE and cut == CUT
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", VALUES)
def test_a_block_with_fused_operators_is_the_same_block(ranks, name):
    wholes = ranks.run(block_results, 2, VALUES[name], {})
    fused = ranks.run(block_results, 2, VALUES[name], {"fused_collectives": True}, True)
    inner = "gather" if name == "gpt2" else "fused gather"  # fc1's activation is not in torch's operator
    for (_, expected), (seen, results) in zip(wholes, fused, strict=True):
        assert seen[:4] == ["fused gather", "fused scatter", inner, "fused scatter"]
        assert seen[4:] == ["fused gather", "gather", "scatter"] * 2
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def shapes_of_the_real_operators() -> list[tuple]:
    group = dist.group.WORLD
    x, weight = torch.empty(3, 5, 8, device="meta"), torch.empty(8, 6, device="meta")
    whole, products = overlap.fused_gather_matmul(x, [weight, weight], group, with_x=True)
    out = overlap.fused_matmul_reduce_scatter(torch.empty(3, 10, 8, device="meta"), weight, group)
    return [tuple(t.shape) for t in (whole, *products, out)]


def test_calls_fit_the_real_operators(ranks):
    """On the meta device: the schema and shapes of torch.ops.symm_mem, which has no CPU kernels."""
    assert ranks.run(shapes_of_the_real_operators, 2)[0] == [(3, 10, 8), (3, 10, 6), (3, 10, 6), (3, 5, 6)]


def order_of_a_backward(kind: str, sequence_parallel: bool) -> list[str]:
    parallel = mk.ParallelContext.create(tp=2, sequence_parallel=sequence_parallel)
    layer = (mk.ColumnParallelLinear if kind == "column" else mk.RowParallelLinear)(C, C, parallel=parallel)
    K = C if kind == "column" else C // 2
    x = torch.randn(B, T // 2 if sequence_parallel and kind == "column" else T, K, requires_grad=True)
    y = layer(x)
    events: list[str] = []
    names = ["start_all_reduce", "start_gather_sequence", "start_reduce_scatter_sequence"]
    originals = {name: getattr(parallel_linear, name) for name in [*names, "input_gradient", "parameter_gradients"]}

    def watched(name, function):
        def call(*inputs):
            events.append(name.removeprefix("start_"))
            result = function(*inputs)
            if isinstance(result, collectives.Pending):
                wait = result.wait
                result.wait = lambda: (events.append(f"wait {name.removeprefix('start_')}"), wait())[1]
            return result

        return call

    for name, function in originals.items():
        setattr(parallel_linear, name, watched(name, function))
    try:
        y.sum().backward()
    finally:
        for name, function in originals.items():
            setattr(parallel_linear, name, function)
    return events


def test_input_gradients_travel_beside_the_weight_gradients_product(ranks):
    for events in ranks.run(order_of_a_backward, 2, "column", False):
        assert events == ["input_gradient", "all_reduce", "parameter_gradients", "wait all_reduce"]
    scatter = "reduce_scatter_sequence"
    for events in ranks.run(order_of_a_backward, 2, "column", True):
        assert events[:3] == ["gather_sequence", "input_gradient", "wait gather_sequence"]
        assert events[3:] == [scatter, "parameter_gradients", f"wait {scatter}"]


# --- what is refused, and why ---


def test_pieces_depend_on_rows_and_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [overlap.pieces_for(rows, None, cuda) for rows in (511, 512)] == [1, overlap.PIECES]
    assert overlap.pieces_for(10**6, None, cpu) == overlap.pieces_for(10**6, 0, cuda) == 1
    assert [overlap.pieces_for(rows, 8, cpu) for rows in (7, 8)] == [1, overlap.PIECES]


def test_reasons_against_fused_operators(monkeypatch):
    assert overlap.why_not_fused("cpu", 2) == "symmetric memory needs CUDA devices, these are of type 'cpu'"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert overlap.why_not_fused("cuda", 4) is None
    assert overlap.why_not_fused("cuda", 8) == "tp = 8 ranks are not all on one machine, which has 4"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: b != 3)
    assert overlap.why_not_fused("cuda", 4) == "the GPUs of this machine cannot reach each other's memory"
    monkeypatch.setattr(overlap, "_operators", SimpleNamespace)
    assert "has no fused symmetric-memory operators; use 2.11 or later" in overlap.why_not_fused("cuda", 4)


def refused_choices() -> None:
    with pytest.raises(ValueError, match="fused_collectives was asked for, but symmetric memory needs CUDA devices"):
        mk.ParallelContext.create(tp=2, fused_collectives=True)


def test_choices_that_cannot_be_met_are_refused(ranks):
    ranks.run(refused_choices, 2)
    with pytest.raises(ValueError, match=r"overlap_rows must be 0 \(never\) or more, got -1"):
        mk.ParallelContext(overlap_rows=-1)
