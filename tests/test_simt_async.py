"""Bugs planted into asynchronous kernels (csrc/simt/tests/planted_async.cu): the emulator catches each of them.

Caught is an error, or a result that is not that of the right kernel; under every schedule but for those named below.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests import simt

TILES = 5


@pytest.fixture(scope="module")
def library():
    return simt.cpu_library()


def pipeline(library, bug):
    x = (torch.arange(TILES * 16 * 64).remainder(251) + 1).bfloat16().view(TILES * 16, 64)
    y = torch.full_like(x, float("nan"))
    library.run("pipeline", [x, y], [TILES, bug])
    return y, 2 * x


def product(library, bug, case="product"):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=generator).bfloat16() for shape in ((64, 16), (16, 128)))
    d = torch.full((128, 64), float("nan"))
    library.run(case, [a, b, d], [bug])
    t, i = torch.arange(128)[:, None], torch.arange(64)
    return d, (a.float() @ b.float())[
        16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2
    ]


def held_product(library, bug):
    return product(library, bug, "held_product")


def handed(library, bug):
    y, z = torch.full((2, 32), float("nan"))
    library.run("handed", [y, z, torch.zeros(1, dtype=torch.int32)], [bug])
    return z, torch.full((32,), 2.0)


def two_copies(library, bug):
    x = torch.arange(64.0).view(2, 32)
    y = torch.full_like(x, float("nan"))
    library.run("two_copies", [x, y], [bug])
    return y, x


def small_copies(library, bug):
    x = torch.arange(TILES * 512.0).view(TILES, 512)
    y = torch.full_like(x, float("nan"))
    library.run("small_copies", [x, y], [TILES, bug])
    return y, x.flip(1)


def meet(library, bug):
    y = torch.full((2,), float("nan"))
    library.run("meet", [y], [bug])
    return y, torch.ones(2)


KERNELS = {
    kernel.__name__: kernel for kernel in (pipeline, product, held_product, handed, two_copies, small_copies, meet)
}
WRONG = "wrong result"
MANY = "more than its . arrivals"
UNSEEN = "reads shared memory that a thread has written without fence_async, or writes over while it is being read"

# kernel, bug, what shows it: a message, or WRONG.
BUGS = [
    ("pipeline", 1, f"{WRONG}|{MANY}|deadlock"),  # a dropped wait
    ("pipeline", 2, f"{WRONG}|{MANY}|deadlock"),  # a wrong phase
    ("pipeline", 3, r"(?s)deadlock.*1 threads wait at mbarrier 'empty' phase 0.*2 of 2 arrivals"),  # a missing arrive
    ("pipeline", 4, f"{WRONG}|{MANY}"),
    ("pipeline", 5, f"{WRONG}|{MANY}"),
    ("pipeline", 6, WRONG),
    ("pipeline", 7, WRONG),  # a wrong swizzle
    ("pipeline", 8, "tma_load: its 2048 bytes at .* are outside of the .* bytes of shared memory"),  # a box outside
    ("pipeline", 9, "its address in shared memory must be a multiple of 128"),
    ("pipeline", 10, r"(?s)deadlock.*mbarrier 'full' phase 0.*0 of 1 arrivals and -16 bytes"),
    ("pipeline", 11, r"(?s)deadlock.*mbarrier 'full' phase 0.*0 of 1 arrivals and 16 bytes"),
    ("pipeline", 12, "mbarrier 'full' is used by a copy before mbar_init_fence"),
    ("pipeline", 13, UNSEEN),  # a missing proxy fence
    ("pipeline", 14, WRONG),
    ("pipeline", 15, f"{WRONG}|{UNSEEN}"),  # a missing trailing barrier
    ("pipeline", 16, "a thread leaves the kernel while its store reads shared memory"),
    ("pipeline", 17, "a thread leaves the kernel without tma_commit"),
    ("pipeline", 18, f"{WRONG}|{MANY}|deadlock"),
    ("pipeline", 19, "the block leaves while named barrier 3 has 32 of its 64 arrivals"),
    ("product", 1, WRONG),
    ("product", 2, "wgmma without a wgmma_fence"),
    ("product", 3, WRONG),
    ("product", 4, UNSEEN),
    ("product", 5, "the block leaves while wgmma runs"),
    ("product", 6, WRONG),
    ("product", 7, f"{WRONG}|wgmma reads outside"),
    ("product", 8, "wgmma_wait completes accumulators that it does not name"),
    ("product", 9, "wgmma reads outside of shared memory"),
    ("product", 10, WRONG),
    ("product", 11, "wgmma adds to accumulators that no wgmma_fence has named"),
    ("product", 12, UNSEEN),
    ("held_product", 1, "registers of operand A have changed while a wgmma that reads them runs"),
    ("held_product", 2, "wgmma with A in registers that no wgmma_fence has named"),
    ("handed", 1, WRONG),
    ("handed", 2, WRONG),
    ("handed", 3, r"(?s)deadlock, a block waits for memory that no earlier block changes:.*1 threads wait at memory"),
    ("two_copies", 1, WRONG),
    ("two_copies", 2, WRONG),
    ("small_copies", 1, WRONG),
    ("small_copies", 2, WRONG),
    ("small_copies", 3, WRONG),
    ("small_copies", 4, "a thread leaves the kernel while its cp_async is under way"),
    ("small_copies", 5, WRONG),
    ("meet", 1, "left the kernel"),
    ("meet", 2, "an mbarrier that was not initialised"),
    ("meet", 3, "block 2 of a cluster of 2"),
    ("meet", 4, "a second cluster_arrive without cluster_wait"),
]
# Only some orders of the warps show these.
SOME_SCHEDULES = {
    ("pipeline", 4),
    ("pipeline", 6),
    ("pipeline", 15),
    ("pipeline", 18),
    ("handed", 1),
    ("handed", 3),
    ("two_copies", 1),
    ("two_copies", 2),
    ("small_copies", 5),
    ("meet", 2),
}


def outcome(library, kernel, bug):
    try:
        result, expected = KERNELS[kernel](library, bug)
    except RuntimeError as error:
        return str(error)
    return "" if torch.equal(result, expected) else WRONG


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_right_kernels_are_right(library, kernel):
    for schedule in simt.SCHEDULES:
        library.schedule(schedule)
        assert outcome(library, kernel, 0) == ""
    library.schedule("forward")


@simt.after_an_error
@pytest.mark.parametrize("kernel, bug, message", BUGS)
def test_a_planted_bug_is_caught(library, kernel, bug, message):
    outcomes = {}
    for schedule in simt.SCHEDULES:
        library.schedule(schedule)
        outcomes[schedule] = outcome(library, kernel, bug)
    library.schedule("forward")
    missed = [name for name, text in outcomes.items() if not text]
    assert not missed or (kernel, bug) in SOME_SCHEDULES, f"not seen under {missed}"
    caught = {text for text in outcomes.values() if text}
    assert caught and all(re.search(message, text) for text in caught), caught
