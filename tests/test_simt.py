"""The emulator of CUDA threads in csrc/simt: right kernels give right results under every schedule, wrong ones do not.

The kernels are in csrc/simt/tests, and tests/simt.py builds them.
"""

from __future__ import annotations

import pytest
import torch

from tests import simt

DTYPES = list(simt.DTYPES)


@pytest.fixture(scope="module")
def library():
    return simt.cpu_library()


@pytest.fixture(params=simt.SCHEDULES)
def schedule(request, library):
    library.schedule(request.param)
    yield request.param
    library.schedule("forward")


def nan_like(x):
    return torch.full_like(x, float("nan"))


def test_rows_in_the_style_of_the_ops(library, schedule):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for rows, columns, threads in ((3, 1024, 256), (5, 520, 64), (2, 4096, 1024), (4, 64, 32)):
            x = torch.randn(rows, columns).mul(3).add(1).to(dtype)
            y = nan_like(x)
            library.run("normalize_rows", [x, y], [rows, columns, simt.DTYPES[dtype], threads])
            expected = torch.nn.functional.layer_norm(x.double(), (columns,))
            rounded = expected.to(dtype).double()  # the same function, rounded once
            bound = 2 * (rounded - expected).abs().max().item() + 2e-6
            torch.testing.assert_close(y.double(), expected, atol=bound, rtol=0)


def test_a_launch_of_no_blocks_runs_nothing(library):
    x, y = torch.ones(64), torch.full((64,), 7.0)
    library.run("normalize_rows", [x, y], [0, 64, 0, 32])
    assert (y == 7).all()


def test_chain_of_blocks_that_wait_for_one_another(library, schedule):
    out, flag = torch.full((9,), -1, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    library.run("chain", [out, flag], [9, 0])
    assert out.tolist() == torch.arange(9).cumsum(0).tolist()


def run_row(library, case, threads, bug):
    x = torch.arange(float(threads))
    y = nan_like(x)
    library.run(case, [x, y], [threads, bug])
    return x, y


def test_kernels_without_a_planted_bug(library, schedule):
    x, y = run_row(library, "reverse", 96, 0)
    assert torch.equal(y, x.flip(0))
    x, y = run_row(library, "uninitialised", 96, 0)
    assert torch.equal(y, x.sum().expand(96))
    x, y = torch.arange(32.0), torch.zeros(32)
    library.run("rotate", [x, y], [0])
    assert torch.equal(y, x.roll(-1))


@simt.after_an_error
@pytest.mark.parametrize(
    "case, numbers, message",
    [
        ("reverse", [96, 1], r"thread \(\d+, 0, 0\).*planted.cu:\d+: the warp diverges: one lane is at sync_block"),
        ("reverse", [96, 2], "have left the kernel before it|leaves the kernel while others wait"),
        ("reverse", [96, 4], "an instruction for global memory at an address in shared memory; load and store_shared"),
        ("reverse", [96, 5], "an instruction for global memory at an address in shared memory"),
        ("uninitialised", [96, 2], "the kernel wrote behind the end of shared memory"),
        ("uninitialised", [96, 3], "uninitialised_kernel: access outside of shared memory"),
        ("chain", [3, 1], r"(?s)deadlock, (no|a) block.*[12] threads wait at memory \(yield_thread\), .*planted.cu:"),
        ("rotate", [1], "a lane of this warp has left the kernel before it|leaves the kernel while its warp waits"),
        ("rotate", [2], "the warp diverges: one lane is at shuffle"),
        ("bad_launch", [96, 0, -1], "takes 384 bytes of shared memory, the launch gave 0"),
        ("bad_launch", [0, 0, -1], r"launch of reverse_kernel grid \(1, 1, 1\) block \(0, 1, 1\).*1 to 1024 threads"),
        ("bad_launch", [32, 300000, -1], "at most 232448 bytes of shared memory"),
        ("bad_launch", [32, 128, 0], "simt runs on the CPU, device -1; got device 0"),
    ],
)
def test_planted_bug_is_an_error(library, schedule, case, numbers, message):
    first = torch.zeros(96)
    if case == "chain":
        first = first.int()
    second = first.clone()
    with pytest.raises(RuntimeError, match=message):
        library.run(case, [first, second], numbers)
    test_kernels_without_a_planted_bug(library, None)  # it goes on after an error


def test_read_of_shared_memory_that_nobody_wrote_is_nan(library, schedule):
    _, y = run_row(library, "uninitialised", 96, 1)
    assert y.isnan().all()


def test_missing_barrier_is_a_wrong_result(library):
    caught = []
    for schedule in simt.SCHEDULES:
        library.schedule(schedule)
        x, y = run_row(library, "reverse", 96, 3)
        caught.append(not torch.equal(y, x.flip(0)))
    library.schedule("forward")
    assert all(caught)


def test_schedule_must_be_known(library):
    for wrong in ("sideways", "pct:", "random:x"):
        with pytest.raises(
            RuntimeError, match=f"must be forward, reverse, random:SEED, pct:SEED or none, got '{wrong}'"
        ):
            library.schedule(wrong)
