"""Saved under one layout, loaded under another; one rank's trouble is every rank's. Two and four gloo ranks, 10 s."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import megakern as mk
from megakern.parallel.blocks import blocks_of
from megakern.train import checkpoint
from megakern.train.checkpoint import CheckpointError
from megakern.train.checkpoint_ranks import gather
from megakern.train.files import Files
from tests.checkpoints import ONE, damage, same_bits

# name: (shape, placement along tp)
TENSORS = {
    "model.column": ((8, 6), Shard(0)),
    "model.row": ((6, 8), Shard(1)),
    "model.norm": ((5,), Replicate()),
    "model.uneven": ((5, 3), Shard(0)),  # over 4 ranks: 2, 2, 1 and 0 rows
    "model.half": ((4, 4, 4), Shard(2)),
    "model.empty": ((0, 3), Shard(0)),
    "optimizer.exp_avg.column": ((8, 6), Shard(0)),
}


def whole(name: str) -> torch.Tensor:
    shape, _ = TENSORS[name]
    seed = sorted(TENSORS).index(name)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return tensor.bfloat16() if name == "model.half" else tensor


def sharded(mesh, placements=None) -> dict[str, torch.Tensor]:
    """The tensors on `mesh` (1-D: tp), and a plain one and a number."""
    tensors = {
        name: distribute_tensor(whole(name), mesh, placements or [placement]) if mesh else whole(name)
        for name, (_, placement) in TENSORS.items()
    }
    return tensors | {"optimizer.step": torch.tensor(17), "plain": torch.arange(9.0).reshape(3, 3)}


def zeroed(tensors: dict) -> dict:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def locals_of(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def reload_and_save(source: str | None, target: str) -> list:
    """Loads `source` (None: makes the tensors) into this world's tp layout, checks each bit, saves it as `target`."""
    parallel = mk.ParallelContext.create(tp=dist.get_world_size())
    mesh = parallel.mesh["tp"] if parallel.mesh else None
    tensors = sharded(mesh)
    if source:
        into = zeroed(tensors)
        assert checkpoint.load(checkpoint.newest(source, parallel), into, parallel) == {"from": source}
        assert same_bits(locals_of(into), locals_of(tensors))
        tensors = into
    path = checkpoint.save(target, 1, tensors, {"from": target}, parallel)
    return [str(path), checkpoint.verify(path)]


@pytest.mark.promise("R11")
def test_tensor_parallel_1_2_4_1(ranks, tmp_path):
    source = None
    for turn, size in enumerate((1, 2, 4, 2, 1)):
        target = str(tmp_path / f"{turn}")
        for path, problems in ranks.run(reload_and_save, size, source, target):
            assert problems == [] and path == f"{target}/step-00000001"
        found = checkpoint.read_manifest(path)
        assert found.layout == {"pp": 1, "dp": 1, "cp": 1, "tp": size}
        pieces = {name: len(entry.pieces) for name, entry in found.tensors.items()}
        assert pieces["model.column"] == size and pieces["model.norm"] == pieces["plain"] == 1
        assert found.tensors["plain"].pieces[0].file.startswith("rank-00000-"), "not the first rank that has it"
        assert pieces["model.uneven"] == {1: 1, 2: 2, 4: 3}[size] and pieces["model.empty"] == 0
        source = target
    into = zeroed(sharded(None))
    checkpoint.load(Path(path), into, ONE)
    assert same_bits(into, sharded(None))


GRIDS = {
    "replicate, shard": lambda dim: [Replicate(), Shard(dim)],
    "shard, replicate": lambda dim: [Shard(dim), Replicate()],
    "both on one dim": lambda dim: [Shard(dim), Shard(dim)],
    "one dim each": lambda dim: [Shard(dim), Shard(1 - dim)],
}


def on_the_grid(folder: str, name: str) -> None:
    parallel = mk.ParallelContext.create(tp=2, dp=2)
    mesh = parallel.mesh["dp", "tp"]
    tensor = torch.arange(48.0).reshape(8, 6)
    for step, dim in enumerate((0, 1)):
        tensors = {"model.w": distribute_tensor(tensor, mesh, GRIDS[name](dim))}
        path = checkpoint.save(folder, step, tensors, {}, parallel)
        entry = checkpoint.read_manifest(path).tensors["model.w"]
        assert len(entry.pieces) == (2 if "replicate" in name else 4)
        for other in GRIDS.values():
            into = {"model.w": distribute_tensor(torch.zeros(8, 6), mesh, other(1 - dim))}
            checkpoint.load(path, into, parallel)
            assert torch.equal(into["model.w"].full_tensor(), tensor)


@pytest.mark.promise("R11")
@pytest.mark.parametrize("name", GRIDS)
def test_two_dimensions(ranks, tmp_path, name):
    ranks.run(on_the_grid, 4, str(tmp_path), name)
    into = {"model.w": torch.zeros(8, 6)}
    checkpoint.load(checkpoint.newest(tmp_path), into, ONE)
    assert torch.equal(into["model.w"], torch.arange(48.0).reshape(8, 6))


def under_fsdp(folder: str) -> list:
    parallel = mk.ParallelContext.create(tp=2, dp=2)
    module = torch.nn.Linear(6, 8)
    tensor = torch.arange(48.0).reshape(8, 6)
    module.weight = torch.nn.Parameter(distribute_tensor(tensor, parallel.mesh["tp"], [Shard(0)]))
    module.bias = torch.nn.Parameter(distribute_tensor(torch.arange(8.0), parallel.mesh["tp"], [Replicate()]))
    fully_shard(module, mesh=parallel.mesh["dp"])
    tensors = {f"model.{name}": parameter for name, parameter in module.named_parameters()}
    path = checkpoint.save(folder, 1, tensors, {}, parallel)
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.zero_()
    checkpoint.load(path, tensors, parallel)
    assert torch.equal(module.weight.full_tensor(), tensor)
    return [str(placement) for placement in module.weight.placements]


def test_fsdp_over_tensor_parallel(ranks, tmp_path):
    assert ranks.run(under_fsdp, 4, str(tmp_path))[0] == ["_S(0, 2)", "S(0)"]
    into = {"model.weight": torch.zeros(8, 6), "model.bias": torch.zeros(8)}
    checkpoint.load(checkpoint.newest(tmp_path), into, ONE)
    assert torch.equal(into["model.weight"], torch.arange(48.0).reshape(8, 6))
    assert torch.equal(into["model.bias"], torch.arange(8.0))


def blocks_against_torch() -> None:
    """The blocks of a tensor of numbers hold those numbers; the local tensors were cut by torch."""
    mesh = mk.ParallelContext.create(tp=2, dp=2).mesh["dp", "tp"]
    for shape in ((8, 6), (7, 6), (5, 3), (1, 1), (3, 12)):
        tensor = torch.arange(shape[0] * shape[1]).reshape(shape)
        # torch distributes strided only where the sizes divide.
        strided = [_StridedShard(0, split_factor=2)] if shape[0] % 4 == 0 else []
        strided += [_StridedShard(1, split_factor=3)] if shape[1] % 6 == 0 else []
        for first in (Shard(0), Shard(1), Replicate(), *strided):
            for second in (Shard(0), Shard(1), Replicate()):
                sharded = distribute_tensor(tensor, mesh, [first, second])
                count = 0
                for block in blocks_of("t", sharded):
                    cut = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape, strict=True))
                    assert torch.equal(block.of(sharded.to_local()), tensor[cut]), (shape, first, second)
                    count += tensor[cut].numel()
                assert count == sharded.to_local().numel()


def test_blocks_hold_what_torch_put_there(ranks):
    ranks.run(blocks_against_torch, 4)


def neighbours() -> list:
    """Four chunks of one row, each cut in two: the first rank has all of them, and they touch."""
    mesh = mk.ParallelContext.create(tp=2).mesh["tp"]
    local = torch.zeros(0 if dist.get_rank() else 4, 2)
    placement = _StridedShard(0, split_factor=4)
    return blocks_of("w", DTensor.from_local(local, mesh, [placement], shape=(4, 2), stride=(2, 1), run_check=False))


def test_blocks_that_touch_are_one(ranks):
    assert ranks.run(neighbours, 2) == [[((0, 0), (4, 2), (0, 0))], []]


def strided_alone(folder: str) -> None:
    """Each rank has two blocks that do not touch."""
    parallel = mk.ParallelContext.create(tp=2)
    tensor = torch.arange(24.0).reshape(8, 3)
    placement = _StridedShard(0, split_factor=2)
    local = torch.cat([part.chunk(2)[parallel.tp_rank] for part in tensor.chunk(2)])
    tensors = {"w": DTensor.from_local(local, parallel.mesh["tp"], [placement], shape=(8, 3), stride=(3, 1))}
    path = checkpoint.save(folder, 1, tensors, {}, parallel)
    local.zero_()
    checkpoint.load(path, tensors, parallel)
    assert torch.equal(local, torch.cat([part.chunk(2)[parallel.tp_rank] for part in tensor.chunk(2)]))


def test_a_rank_with_several_blocks(ranks, tmp_path):
    ranks.run(strided_alone, 2, str(tmp_path))
    path = checkpoint.newest(tmp_path)
    assert len(checkpoint.read_manifest(path).tensors["w"].pieces) == 4
    into = {"w": torch.zeros(8, 3)}
    checkpoint.load(path, into, ONE)
    assert torch.equal(into["w"], torch.arange(24.0).reshape(8, 3))


# --- trouble on one rank ---


class FailsOn(Files):
    """Writing fails on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def write(self, descriptor, data):
        if dist.get_rank() == self.rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        function(*arguments, **options)
    return str(error.value)


def one_rank_fails(folder: str) -> list[str]:
    parallel = mk.ParallelContext.create(tp=2)
    rank, mesh = parallel.tp_rank, parallel.mesh["tp"]
    good = sharded(mesh)
    path = checkpoint.save(folder, 1, good, {}, parallel)
    said = [refusal(checkpoint.save, folder, 2, good, {}, parallel, files=FailsOn(broken)) for broken in (0, 1)]
    bad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    if rank == 1:
        bad.to_local()[0] = float("nan")
    said.append(refusal(checkpoint.save, folder, 2, good | {"model.bad": bad}, {}, parallel))
    said.append(refusal(checkpoint.save, folder, 2 + rank, good, {}, parallel))
    said.append(refusal(checkpoint.save, folder, 2, {"w": torch.ones(3 + rank)}, {}, parallel))
    mixed = torch.ones(4) if rank else distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    said.append(refusal(checkpoint.save, folder, 2, {"w": mixed}, {}, parallel))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    said.append(refusal(checkpoint.save, folder, 2, {"w": partial}, {}, parallel))
    # Loading: only rank 1 asks for another shape; then a shard that rank 0 wrote is damaged.
    into = zeroed(good)
    said.append(refusal(checkpoint.load, path, into | {"plain": torch.zeros(3 + rank)}, parallel))
    parallel.barrier()
    if rank == 0:
        damage(min(path.glob("rank-00000-*")))
    parallel.barrier()
    said.append(refusal(checkpoint.load, path, into, parallel))
    said.append(refusal(checkpoint.newest, folder, parallel))
    assert not any(tensor.any() for tensor in locals_of(into).values())
    return said


def test_an_error_on_one_rank_reaches_all(ranks, tmp_path):
    first, second = ranks.run(one_rank_fails, 2, str(tmp_path))
    assert first == second
    expected = [
        "failed: rank 0: [Errno 28] No space left on device: ",
        "failed: rank 1: [Errno 28] No space left on device: ",
        "failed: rank 1: not saved, these hold NaN or infinity: model.bad;",
        "the ranks are at different steps: [2, 3]",
        "w is float32 [4] on rank 1, but float32 [3] before it",
        "the ranks together do not hold w exactly once: its pieces have 6 elements, the tensor has 4",
        "failed: ranks 0, 1: w is a sum that is not finished (placements (Partial(sum),)); reduce it first",
        "failed: rank 0: it does not fit:\n  plain: saved with shape [3, 3], wanted [3]; rank 1: it does not fit:",
        "it is damaged, nothing was loaded:\n  rank-00000-part-000.safetensors: its SHA-256 is not",
        "no sound checkpoint in",
    ]
    for message, text in zip(first, expected, strict=True):
        assert text in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def uneven_placement() -> str:
    """FSDP over tensor parallel that does not divide: what torch calls the placements is not where the rows are."""
    mesh = mk.ParallelContext.create(tp=2).mesh["tp"]
    local = torch.zeros(2 if dist.get_rank() else 3, 2)
    wrong = DTensor.from_local(local, mesh, [Shard(0)], shape=(9, 2), stride=(2, 1), run_check=False)
    try:
        blocks_of("w", wrong)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_local_shape_that_does_not_follow_is_refused(ranks):
    first, _ = ranks.run(uneven_placement, 2)
    assert first.startswith("w of shape (9, 2): its placements give this rank (5, 2), but its local tensor has (3, 2);")


def gathered() -> list:
    parallel = mk.ParallelContext.create()
    rank = parallel.world_rank
    reports = [{"rank": rank, "text": "é" * 1000 * rank}, None, [] if rank else {"a": [1.5, None, True]}]
    return [gather(parallel, report) for report in reports]


def test_reports_of_other_lengths_and_kinds(ranks):
    for result in ranks.run(gathered, 4):
        assert result[0] == [{"rank": rank, "text": "é" * 1000 * rank} for rank in range(4)]
        assert result[1:] == [[None] * 4, [{"a": [1.5, None, True]}, [], [], []]]
        json.dumps(result)
