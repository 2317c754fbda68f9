"""Collectives through shared memory beside gloo and float64, and ranks that die, differ or come late. No GPU."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

import megakern as mk
from megakern.parallel import collectives, shared
from tests.closeness import assert_close_to_ref
from tests.commands import FRESH

pytestmark = pytest.mark.skipif(shared.why_not() is not None, reason=str(shared.why_not()))

SLOTS, CHUNK = 4, 1024  # small, so that a few thousand elements are more than a ring holds
SHAPES = [(0,), (1,), (2, 4, 8), (1009,), (3, 16, 61), (2, 8, 1031)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def open_memory() -> int:
    """Files of shared memory that this process has; they have no name, so nothing can be left of them."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link == "/memfd:megakern (deleted)" for link in links)


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10).to(dtype)


def group_of(ranks: list[int] | None = None, **sizes: int) -> dist.ProcessGroup:
    """A new gloo group whose channel has a ring of these sizes."""
    before = shared.SLOTS, shared.CHUNK
    shared.SLOTS, shared.CHUNK = sizes.get("slots", SLOTS), sizes.get("chunk", CHUNK)
    try:
        group = dist.new_group(ranks)
        if dist.get_rank(group) >= 0:
            assert str(shared.transport(group)) == "shared memory"
    finally:
        shared.SLOTS, shared.CHUNK = before
    return group


def same_on_all_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    raw = x.contiguous().view(-1).view(torch.uint8)
    every = [torch.empty_like(raw) for _ in range(group.size())]
    dist.all_gather(every, raw, group=group)
    assert all(torch.equal(other, raw) for other in every), "ranks have other bits"


def sums(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and in the order of ranks at the precision that is promised."""
    parts = [value(rank, shape, dtype) for rank in range(size)]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return sum(part.double() for part in parts), total.to(dtype)


def check_results(group: dist.ProcessGroup | None = None) -> None:
    group = group or group_of()
    rank, size = group.rank(), group.size()
    for shape in SHAPES:
        for dtype in DTYPES:
            x, (reference, promised) = value(rank, shape, dtype), sums(shape, dtype, size)
            kept = x.clone()
            total = collectives.all_reduce(x, group)
            assert torch.equal(total, promised), f"all_reduce of {shape} {dtype}"
            theirs = x.clone()
            dist.all_reduce(theirs, group=group)
            if size == 2:
                assert torch.equal(total, theirs), "gloo has other bits"
            assert_close_to_ref(total, reference, theirs)
            same_on_all_ranks(total, group)
            largest = collectives.all_reduce(x, group, dist.ReduceOp.MAX)
            dist.all_reduce(theirs.copy_(x), op=dist.ReduceOp.MAX, group=group)
            assert torch.equal(largest, theirs)
            assert torch.equal(collectives.all_gather_last(x, group), gathered(shape, dtype, size, -1))
            if len(shape) == 3:
                assert torch.equal(collectives.gather_sequence(x, group), gathered(shape, dtype, size, -2))
                strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
                part = collectives.reduce_scatter_sequence(strided, group) if shape[-2] % size == 0 else None
                assert part is None or torch.equal(part, promised.chunk(size, -2)[rank])
            assert torch.equal(x, kept), "an input was changed"
            collectives.all_reduce_in_place(x, group)
            assert torch.equal(x, promised)
    counts = value(rank, (5, 301), torch.int64)
    collectives.all_reduce_in_place(counts, group)
    assert torch.equal(counts, sum(value(r, (5, 301), torch.int64) for r in range(size)))
    half = torch.full((7,), 1.5 + rank, dtype=torch.float16)  # not for a channel: gloo's
    assert collectives.all_reduce(half, group).tolist() == [sum(1.5 + r for r in range(size))] * 7
    odd = torch.tensor([1.0, float("nan"), 2.0] if rank else [float("nan"), 1.0, 3.0])
    assert collectives.all_reduce(odd, group, dist.ReduceOp.MAX).isnan().tolist() == [True, True, False]


def gathered(shape: tuple[int, ...], dtype: torch.dtype, size: int, dim: int) -> torch.Tensor:
    return torch.cat([value(rank, shape, dtype) for rank in range(size)], dim)


def check_order(times: int) -> None:
    """Several at once, awaited in another order; ranks are late by chance, and do other things in between."""
    group = group_of()
    rank, size = group.rank(), group.size()
    late = torch.Generator().manual_seed(100 + rank)
    xs = [value(rank, (2, 8, width), torch.float32) for width in (1, 40, 300)]
    want_sum = [sums(x.shape, x.dtype, size)[1] for x in xs]
    want_all = [gathered(x.shape, x.dtype, size, -2) for x in xs]
    for turn in range(times):
        if turn % 10 == 0:
            time.sleep(0.02 * torch.rand((), generator=late).item())
        pending = []
        for x in xs:
            pending.append(collectives.start_all_reduce(x.clone(), group))
            pending.append(collectives.start_gather_sequence(x, group))
            pending.append(collectives.start_reduce_scatter_sequence(x, group))
        direct = collectives.all_reduce(xs[1], group)
        results = [each.wait() for each in reversed(pending)][::-1]
        assert torch.equal(direct, want_sum[1])
        for i in range(len(xs)):
            assert torch.equal(results[3 * i], want_sum[i])
            assert torch.equal(results[3 * i + 1], want_all[i])
            assert torch.equal(results[3 * i + 2], want_sum[i].chunk(size, -2)[rank])


def check_everything(times: int) -> None:
    check_results()
    check_results(group_of(slots=1, chunk=128))
    check_order(times)
    group_of(slots=3, chunk=2**16)
    for changed, reason in REFUSALS:
        before = changed()
        group = dist.new_group()
        assert str(shared.transport(group)) == f"gloo: {reason}"
        before()
        assert torch.equal(collectives.all_reduce(torch.ones(3), group), torch.full((3,), float(group.size())))


def _no_room(*_):
    raise OSError(28, "No space left on device")


def _patch(rank: int, where: object, name: str, changed: object) -> Callable[[], Callable[[], None]]:
    """`_patch(...)()` changes a name on one rank, and returns what changes it back."""

    def apply() -> Callable[[], None]:
        if dist.get_rank() != rank:
            return lambda: None
        before = getattr(where, name)
        setattr(where, name, changed)
        return lambda: setattr(where, name, before)

    return apply


REFUSALS = [
    (
        _patch(1, shared, "machine", lambda: "another"),
        "ranks 0 and 1 are on different machines, or in different containers",
    ),
    (_patch(1, os, "environ", {"MEGAKERN_SHARED_MEMORY": "0"}), f"{shared.WHY[1]} (rank 1)"),
    (_patch(0, shared, "_cpu", None), f"{shared.WHY[2]} (rank 0)"),
    (_patch(1, shared.sys, "platform", "darwin"), f"{shared.WHY[3]} (rank 1)"),
    (_patch(0, os, "posix_fallocate", _no_room), f"{shared.WHY[4]} (rank 0)"),
    (_patch(0, os, "memfd_create", _no_room), f"{shared.WHY[4]} (rank 0)"),
    (_patch(1, os, "pread", lambda *_: b"another!"), f"{shared.WHY[5]} (rank 1)"),
    (_patch(1, os, "open", _no_room), f"{shared.WHY[5]} (rank 1)"),
]


def test_two_ranks(ranks):
    before = ranks.run(open_memory, 2)
    ranks.run(check_everything, 2, 100)
    assert ranks.run(open_memory, 2) == before, "memory outlives its groups"


def test_four_ranks_on_fewer_cores(ranks):
    ranks.run(check_everything, 4, 30)


def check_groups() -> None:
    context = mk.ParallelContext.create(tp=2)
    for dim in ("tp", "dp"):
        assert str(shared.transport(context.group(dim))) == "shared memory"
        check_results(context.group(dim))
    parallel_groups = [group_of([0, 2, 3]), group_of([1, 2])]
    mine = [group for group in parallel_groups if dist.get_rank(group) >= 0]
    for group in mine:
        members = dist.get_process_group_ranks(group)
        total = collectives.all_reduce(torch.tensor([float(dist.get_rank())]), group)
        assert total.item() == sum(members)


def test_groups_of_a_mesh_and_others(ranks):
    ranks.run(check_groups, 4)


def test_the_setting_is_checked(monkeypatch):
    monkeypatch.setenv("MEGAKERN_SHARED_MEMORY", "yes")
    with pytest.raises(ValueError, match=r"MEGAKERN_SHARED_MEMORY must be 0 \(use gloo\) or 1, got 'yes'"):
        shared.why_not()
    monkeypatch.setenv("MEGAKERN_SHARED_MEMORY", "0")
    assert shared.why_not() == "MEGAKERN_SHARED_MEMORY=0 asks for gloo"


# --- failures: in processes of their own, which do not survive them ---

TIMEOUT = 1.0


def fail(rank: int, size: int, store: str, kind: str, pipe) -> None:
    """Ranks go on until rank 1 fails in the way of `kind`; each other rank tells what it was told, and when."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = dist.new_group(timeout=timeout)
    x = torch.ones(400_000)
    for _ in range(3):
        collectives.all_reduce(x, group)
    assert open_memory() == 1
    began = time.monotonic()
    try:
        if rank == 1:
            DO[kind](x, group)
        collectives.all_reduce(x, group)
        collectives.all_reduce(x, group)
        pipe.send((rank, "nothing", 0.0))
    except dist.DistError as error:
        seconds = time.monotonic() - began
        with pytest.raises(dist.DistError, match="shared memory"):  # and again, at once
            collectives.all_reduce(x, group)
        pipe.send((rank, str(error), seconds))
    time.sleep(60 if kind == "late" and rank == 1 else 3)
    os._exit(0)


def killed_while_it_waits(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    collectives.start_all_reduce(x, group)
    os.kill(os.getpid(), 9)


DO = {
    "killed": killed_while_it_waits,
    "late": lambda x, group: time.sleep(60),
    "shape": lambda x, group: collectives.all_reduce(x[:7], group),
    "dtype": lambda x, group: collectives.all_reduce(x.double(), group),
    "other": lambda x, group: collectives.all_gather_last(x[:6], group),
}
SAID = {
    "killed": "rank 1 of undefined has ended",
    "late": "rank 1 of undefined did not come to this collective within 1 s",
    "shape": "rank 1 of undefined makes another collective here: all_reduce of 7 elements of float32",
    "dtype": "rank 1 of undefined makes another collective here: all_reduce of 400000 elements of float64",
    "other": "rank 1 of undefined makes another collective here: all_gather of 24 bytes",
}


@pytest.mark.parametrize("kind", ["killed", "late", "shape", pytest.param("dtype", marks=pytest.mark.slow),
                                  pytest.param("other", marks=pytest.mark.slow)])  # fmt: skip
def test_a_rank_that_fails_is_named_in_time(tmp_path, kind):
    size = 3
    ours, theirs = FRESH.Pipe(duplex=False)
    start = partial(FRESH.Process, target=fail, daemon=True)
    processes = [start(args=(rank, size, str(tmp_path / "store"), kind, theirs)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        told = {}
        while len(told) < 2:
            assert ours.poll(60), f"only ranks {sorted(told)} have ended"
            rank, text, seconds = ours.recv()
            if rank != 1:
                told[rank] = text, seconds
    finally:
        for process in processes:
            process.kill()
            process.join()
    for text, seconds in told.values():
        assert SAID[kind] in text
        assert seconds < 15  # alone 0.1 s, and TIMEOUT more for a rank that is late
