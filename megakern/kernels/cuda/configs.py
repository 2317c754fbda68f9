"""How the C++ norms spread rows over threads, blocks and clusters: the one table, with the reason for each choice.

Where no figure stands, none is measured yet. A choice depends on sizes and on what kind of GPU it is, never on how many
multiprocessors it has: sums over rows are then the same on all GPUs of a kind.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megakern.kernels.cuda.module import cdiv

VECTOR = 16  # bytes of one access
STAGES = 2  # rows of a thread in shared memory: one being worked on, one arriving
MULTIPROCESSORS = 132  # of the largest sm_90; never the GPU's own count


@dataclass(frozen=True, eq=False)  # looked up by identity, in each call
class Rule:
    """What decides how rows are spread."""

    steps: int
    """Vectors of a row that a thread holds, if the row has enough threads."""
    threads: int
    """Of a block that holds several rows; longer rows take more."""
    resident: int
    """Threads of all blocks of a multiprocessor, at most."""
    most: int
    """Vectors of a row in one block; longer rows are split over a cluster of 2, 4 or 8."""
    longest: int
    """Threads of a block that the kernel is compiled for."""
    sums: bool
    """Does a thread keep sums of its columns, so that it cannot hold more than `steps`?"""
    # A cluster lies within one of the GPU's groups of multiprocessors, so that 4 and 8 leave some out. On an H200
    # not all of 32 clusters of 4 ran at once: 2048 x 65536 backward took 1.75 x the time of 30.
    clusters: tuple[int, int, int, int] = (132, 66, 30, 14)
    """Clusters of 1, 2, 4 and 8 blocks that run at the same time when each block needs a multiprocessor of its own."""


# Blocks of 8 warps, so that several share a multiprocessor and one works while another waits for its sums; at 64
# registers a thread 1024 threads, with 64 KB of each tensor in flight.
FORWARD = Rule(steps=4, threads=256, resident=1024, most=2048, longest=1024, sums=False)
# 128 registers a thread: 64 fp32 sums of four vectors of 16-bit columns stay in them. Two blocks of 256 threads a
# multiprocessor are faster than one of 512 on an H200 (16384 x 4096: 74 % of the copy rate to 68 %).
BACKWARD = Rule(steps=4, threads=256, resident=512, most=2048, longest=512, sums=True)


@dataclass(frozen=True)
class Rows:
    """Threads of a row in each block of its cluster, rows of a block at a time, blocks of a cluster, most clusters."""

    threads: int
    """0: in chunks, by csrc/norm_chunks.cu."""
    rows: int
    cluster: int
    clusters: int
    why: str

    def of(self, M: int) -> tuple[int, int, int, int]:
        """The same for M rows, with fewer rows a block where some multiprocessors would have none."""
        rows, unit = self.rows, max(1, 32 // self.threads) if self.threads else 1
        if rows * MULTIPROCESSORS > M:
            rows = min(rows, max(1, cdiv(cdiv(M, MULTIPROCESSORS), unit)) * unit)
        return self.threads, rows, self.cluster, min(self.clusters, cdiv(M, rows))

    def __str__(self) -> str:
        if not self.threads:
            return f"in chunks ({self.why})"
        parts = f"{self.threads} threads a row, {self.rows} rows a block"
        if self.cluster > 1:
            parts += f", {self.cluster} blocks a row"
        return f"{parts}, at most {self.clusters} {'clusters' if self.cluster > 1 else 'blocks'} ({self.why})"


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
    return _rows(FORWARD, C, size, 2 if residual else 1, kind)


def norm_backward(C: int, size: int, residual: bool, kind: Kind) -> Rows:
    return _rows(BACKWARD, C, size, 3 if residual else 2, kind)


@functools.lru_cache(4096)
def _rows(rule: Rule, C: int, size: int, inputs: int, kind: Kind) -> Rows:
    chunks = functools.partial(Rows, 0, 1, 1, MULTIPROCESSORS)
    if C * size % VECTOR:
        return chunks("its rows are no multiples of 16 bytes")
    vectors = C * size // VECTOR
    cluster = 1
    while kind.clusters and cluster < 8 and vectors > cluster * rule.most:
        cluster *= 2
    mine = cdiv(vectors, cluster)
    threads = 1 << (cdiv(mine, rule.steps) - 1).bit_length()
    if threads > 32:
        threads = cdiv(mine, rule.steps * 32) * 32
    if threads > rule.longest and rule.sums:
        return chunks(f"a row and its sums do not fit into {cluster} multiprocessors")
    threads = min(threads, rule.longest)
    rows = max(1, rule.threads // threads) if cluster == 1 else 1
    unit = max(1, 32 // threads)

    def bytes_of(rows: int) -> int:
        sums = 2 * 8 * rows * cdiv(threads, 32) * cluster + 32
        return STAGES * inputs * cdiv(mine, threads) * threads * rows * VECTOR + sums

    while bytes_of(rows) > kind.shared and rows > unit:
        rows = max(unit, rows // 2 // unit * unit)
    if bytes_of(rows) > kind.shared:
        return chunks(f"two rows do not fit into the shared memory of {cluster} multiprocessors")
    resident = max(1, min(rule.resident // (threads * rows), kind.shared // (bytes_of(rows) + 1024)))
    why = f"{cdiv(mine, threads)} vectors of 16 bytes a thread, {resident} blocks a multiprocessor"
    return Rows(threads, rows, cluster, rule.clusters[cluster.bit_length() - 1] * resident, why)


def describe_norm(problem) -> str:
    """For `mk.explain`, on the GPU in use."""
    size, residual = problem.dtype.itemsize, problem.options["residual"]
    kind = kind_of(torch.cuda.current_device() if problem.device == "cuda" else -1)
    forward, backward = (choice(problem.sizes["C"], size, residual, kind) for choice in (norm_forward, norm_backward))
    return f"forward {forward}; backward {backward}"
