"""How the C++ norms spread rows over threads, blocks and clusters: the one table, with the reason for each choice.

Where no figure stands, none is measured yet. A choice depends on sizes and on what kind of GPU it is, never on how many
multiprocessors it has: sums over rows are then the same on all GPUs of a kind.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megakern.kernels.cuda.module import cdiv

VECTOR = 16  # bytes of one access
MULTIPROCESSORS = 132  # of the largest sm_90; never the GPU's own count


class Way(NamedTuple):
    """How rows up to a width are held by threads."""

    most: int
    """Vectors of a row in one block."""
    steps: int
    """Of them a thread holds, if the row has enough threads."""


@dataclass(frozen=True, eq=False)  # looked up by identity, in each call
class Rule:
    """What decides how rows are spread."""

    ways: tuple[Way, ...]
    """From narrow to wide; longer rows are split over a cluster of 2, 4 or 8."""
    threads: int
    """Of a block that holds several rows; longer rows take more."""
    longest: int
    """Threads of a block that the kernel is compiled for."""
    resident: int
    """Threads of all blocks of a multiprocessor, at most."""
    stages: int = 0
    """Rows of a thread in shared memory, at most: one being worked on, the others arriving; two where more would leave
    room for fewer blocks. 0: in registers."""
    # A cluster lies within one of the GPU's groups of multiprocessors, so that 4 and 8 leave some out. On an H200
    # not all of 32 clusters of 4 ran at once: 2048 x 65536 backward took 1.75 x the time of 30.
    clusters: tuple[int, int, int, int] = (132, 66, 30, 14)
    """Clusters of 1, 2, 4 and 8 blocks that run at the same time when each block needs a multiprocessor of its own."""


# Forward: a row in registers, as many blocks as the rows need. 4.3 TB/s for 0.8 us are 26 KB on their way to or from
# each of 132 multiprocessors, and as much again while a block adds up. Bytes of x that the threads of a multiprocessor
# hold, all loads of a thread before its first sum (bf16; blocks x threads x vectors x 16):
#
#       C | vectors | threads a row | a block | blocks | KB  | x + residual
#     128 |      16 |         8 x 2 |     256 |      5 |  40 |  80
#     512 |      64 |        32 x 2 |     256 |      5 |  40 |  80
#    1024 |     128 |        32 x 4 |     256 |      4 |  64 | 128
#    4096 |     512 |       128 x 4 |     256 |      4 |  64 | 128
#    8192 |    1024 |       256 x 4 |     256 |      4 |  64 | 128
#   16384 |    2048 |       512 x 4 |     512 |      2 |  64 | 128
#   32768 |    4096 |       512 x 8 |     512 |      2 | 128 | 1 block of 1024 x 4: 128
#   65536 |    8192 |      1024 x 8 |    1024 |      1 | 128 | 2 blocks of 1024 x 4 a row: 128
#
# 48 registers a thread for 2 vectors, 64 for 4 and 8. A row of one warp needs no barrier: up to 1024 columns have one.
FORWARD = Rule((Way(64, 2), Way(2048, 4), Way(8192, 8)), threads=256, longest=1024, resident=1024)
# Registers hold both: no room for 8 vectors of each.
FORWARD_RESIDUAL = Rule((Way(64, 2), Way(4096, 4)), threads=256, longest=1024, resident=1024)
# 128 registers a thread: 64 fp32 sums of four vectors of 16-bit columns stay in them. Two blocks of 256 threads a
# multiprocessor are faster than one of 512 on an H200 (16384 x 4096: 74 % of the copy rate to 68 %).
#
# Rows are not held in registers as forward: 64 sums and the 32 words of two rows are 96 of 128, and the next rows would
# be 32 more. They wait in shared memory: 512 threads x 4 vectors x 16 bytes x (dy and h) are 64 KB a stage of a
# multiprocessor, 96 with the residual's gradient. At the copy rate, 4.3 TB/s over 132, a row of each of two blocks is
# read and written in 3 us (8192 columns: 2 x 48 KB). With two stages its loads start 3 us before they are needed, and
# take as long: 64 KB among 96 at that rate, and 0.7 us of latency. With three they have 6 us. 192 KB fit; beside the
# residual's gradient two stages do. L1 keeps 28 KB, 16 of them the bf16 weight of 8192 columns; an fp32 one comes from
# L2 then. Not yet measured.
BACKWARD = Rule((Way(2048, 4),), threads=256, longest=512, resident=512, stages=3)


@dataclass(frozen=True, eq=False)
class Rows:
    """Threads of a row in each block of its cluster, rows of a block at a time, blocks of a cluster."""

    threads: int
    """0: in chunks, by csrc/norm_chunks.cu."""
    rows: int
    cluster: int
    clusters: int
    """At most; 0: as many as the rows need."""
    stages: int
    why: str

    @functools.lru_cache(4096)  # noqa: B019 - there are few, and they stay
    def of(self, M: int) -> tuple[int, ...]:
        """The last arguments of the launch for M rows, with fewer rows a block where some multiprocessors would have
        none. Backward also: clusters, stages."""
        rows, unit = self.rows, max(1, 32 // self.threads) if self.threads else 1
        if rows * MULTIPROCESSORS > M:
            rows = min(rows, max(1, cdiv(cdiv(M, MULTIPROCESSORS), unit)) * unit)
        if not self.clusters:
            return self.threads, rows, self.cluster
        return self.threads, rows, self.cluster, min(self.clusters, cdiv(M, rows)), self.stages

    def __str__(self) -> str:
        if not self.threads:
            return f"in chunks ({self.why})"
        parts = f"{self.threads} threads a row, {self.rows} rows a block"
        if self.cluster > 1:
            parts += f", {self.cluster} blocks a row"
        if self.clusters:
            parts += f", at most {self.clusters} {'clusters' if self.cluster > 1 else 'blocks'}, {self.stages} stages"
        return f"{parts} ({self.why})"


@dataclass(frozen=True, eq=False)
class Kind:
    """What a GPU can do that a choice depends on."""

    shared: int
    """Bytes of shared memory that a block may have."""
    clusters: bool


HOPPER = Kind(227 << 10, True)


@functools.cache
def kind_of(device: int) -> Kind:
    """The kind of GPU number `device`; -1: the CPU, which plays the largest kind for tests."""
    if device < 0:
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return Kind(properties.shared_memory_per_block_optin, properties.major >= 9)


def norm_forward(C: int, size: int, residual: bool, kind: Kind) -> Rows:
    """C elements of `size` bytes a row."""
    return _rows(FORWARD_RESIDUAL if residual else FORWARD, C, size, 0, kind)


def norm_backward(C: int, size: int, residual: bool, kind: Kind) -> Rows:
    return _rows(BACKWARD, C, size, 3 if residual else 2, kind)


@functools.lru_cache(4096)
def _rows(rule: Rule, C: int, size: int, staged: int, kind: Kind) -> Rows:
    """staged: tensors whose rows pass through shared memory."""
    persistent, stages = rule.stages > 0, min(2, rule.stages)
    chunks = functools.partial(Rows, 0, 1, 1, MULTIPROCESSORS * persistent, stages)
    if C * size % VECTOR:
        return chunks("its rows are no multiples of 16 bytes")
    vectors, cluster, most = C * size // VECTOR, 1, rule.ways[-1].most
    while kind.clusters and cluster < 8 and vectors > cluster * most:
        if rule is FORWARD:
            return _rows(FORWARD_RESIDUAL, C, size, staged, kind)  # 8 vectors a thread: without clusters
        cluster *= 2
    mine = cdiv(vectors, cluster)
    way = next((way for way in rule.ways if mine <= way.most), None)
    threads = 0
    if way:
        threads = 1 << (cdiv(mine, way.steps) - 1).bit_length()
        if threads > 32:
            threads = cdiv(mine, way.steps * 32) * 32
    if not way or threads > rule.longest:
        return chunks(f"a row does not fit into the registers of {cluster} multiprocessor{'s' if cluster > 1 else ''}")
    rows = max(1, rule.threads // threads) if cluster == 1 else 1
    unit = max(1, 32 // threads)

    def bytes_of(rows: int, stages: int) -> int:
        sums = 2 * 12 * rows * cdiv(threads, 32) * cluster + 16
        return stages * staged * cdiv(mine, threads) * threads * rows * VECTOR + sums

    while bytes_of(rows, stages) > kind.shared and rows > unit:
        rows = max(unit, rows // 2 // unit * unit)
    if bytes_of(rows, stages) > kind.shared:
        return chunks(f"{stages} rows do not fit into the shared memory of {cluster} multiprocessors")
    resident = max(1, min(rule.resident // (threads * rows), kind.shared // (bytes_of(rows, stages) + 1024)))
    while stages < rule.stages and kind.shared // (bytes_of(rows, stages + 1) + 1024) >= resident:
        stages += 1
    clusters = rule.clusters[cluster.bit_length() - 1] * resident if persistent else 0
    why = f"{cdiv(mine, threads)} vectors of 16 bytes a thread"
    return Rows(
        threads,
        rows,
        cluster,
        clusters,
        stages,
        f"{why}, {resident} blocks a multiprocessor" if persistent else why,
    )


def describe_norm(problem) -> str:
    """For `mk.explain`, on the GPU in use."""
    size, residual = problem.dtype.itemsize, problem.options["residual"]
    kind = kind_of(torch.cuda.current_device() if problem.device == "cuda" else -1)
    forward, backward = (choice(problem.sizes["C"], size, residual, kind) for choice in (norm_forward, norm_backward))
    return f"forward {forward}; backward {backward}"
