"""Launchers of csrc/cross_entropy*.cu: row losses, their gradient over the logits or apart, and both in one pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.distributed import ReduceOp

from megakern.kernels.cross_entropy import launchers
from megakern.kernels.cuda.module import DTYPES, call, pointer
from megakern.kernels.memory import empty
from megakern.parallel.collectives import all_reduce_in_place

HELD = 10
"""Chunks of 16 bytes that a thread holds in registers, where shared memory alone cannot keep a row; as in the .cu."""

SUMS_BYTES = 1024  # of shared memory, for the sums of a block: room to spare
RESERVED = 1024  # of shared memory, for the driver, in each block; a block alone can have all but that
THREADS = {512: 128, 4096: 256}
"""For rows of up to so many chunks; above 512. Loss and gradient of 16384 x 32000 on an H200: 256 threads 579 us, 128
605, 512 632. The loss alone takes as many, so that both ways give the same bits; 128 would be 2 to 4 % faster."""


def threads_for(chunks: int) -> int:
    return next((threads for most, threads in THREADS.items() if chunks <= most), 512)


@dataclass(frozen=True)
class Plan:
    """How rows of logits stay on the chip between their loss and their gradient."""

    threads: int
    held: int
    """Chunks of 16 bytes a thread in registers."""
    kept: int
    """Chunks a thread in shared memory."""
    ahead: int
    """Chunks a thread of the next row, in shared memory beyond them."""
    blocks: int
    """Blocks that share the rows."""
    read_again: float
    """Part of a row that fits in neither."""

    def __str__(self) -> str:
        again = f", {self.read_again:.0%} of a row read again" if self.read_again else ""
        return (
            f"loss and gradient in one pass: {self.blocks} blocks of {self.threads} threads; of a row, a thread keeps "
            f"{self.kept} x 16 bytes in shared memory, beside {self.ahead} of the next row, and {self.held} x 16 in "
            f"registers{again}"
        )


@functools.lru_cache(maxsize=256)
def plan(M: int, columns: int, element_size: int, multiprocessors: int, shared: int) -> Plan:
    """shared: bytes of shared memory that a block can have. The plan changes no bit of the results."""
    chunks = max(1, columns * element_size // 16)
    threads = threads_for(chunks)
    steps = -(-chunks // threads)
    most = max(0, (shared - SUMS_BYTES) // (16 * threads))
    held = HELD if steps > most else 0
    kept = min(steps - held, most) if steps > held else 0
    bytes_of_block = SUMS_BYTES + 16 * threads * kept
    together = 1 if held else max(1, min(1024 // threads, shared // bytes_of_block))  # 64 registers a thread: 1024
    again = max(0.0, 1 - (held + kept) * threads / chunks)
    room = ((shared + RESERVED) // together - RESERVED - SUMS_BYTES) // (16 * threads)
    ahead = max(0, min(kept, room - kept))
    return Plan(threads, held, kept, ahead, max(1, min(M, multiprocessors * together)), again)


@functools.cache
def chip(device: torch.device) -> tuple[int, int]:
    """-> multiprocessors, bytes of shared memory that a block can have. For the emulator those of an H200."""
    if device.type == "cpu":
        return 132, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def plan_for(M: int, columns: int, element_size: int, device: torch.device) -> Plan:
    return plan(M, columns, element_size, *chip(device))


def _rows(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """The fields of struct CrossEntropy."""
    M, C = logits.shape
    sizes = (M, C, logits.stride(0), shard.start, shard.real, vocab_size, ignore_index)
    return logits.data_ptr(), targets.data_ptr(), DTYPES[logits.dtype], *sizes, label_smoothing, z_loss


def row_losses(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """logits (M, V/R), targets (M,) -> loss (M,), lse (M,), fp32."""
    M = logits.shape[0]
    rows = _rows(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, shard)
    loss, lse = (empty((M,), torch.float32, logits.device) for _ in range(2))
    threads = threads_for(shard.real * logits.element_size() // 16)
    if shard.group is None:
        call("cross_entropy_rows", logits, *rows, loss.data_ptr(), lse.data_ptr(), threads)
        return loss, lse
    peaks = empty((M,), torch.float32, logits.device)
    sums = empty((3 if label_smoothing else 2, M), torch.float32, logits.device)
    call("cross_entropy_parts", logits, *rows, peaks.data_ptr(), sums.data_ptr(), threads)
    highest = peaks.clone()
    all_reduce_in_place(highest, shard.group, ReduceOp.MAX)
    call("cross_entropy_shift", logits, *rows, peaks.data_ptr(), highest.data_ptr(), sums.data_ptr())
    all_reduce_in_place(sums, shard.group)
    pointers = [x.data_ptr() for x in (highest, sums, loss, lse)]
    call("cross_entropy_finish", logits, *rows, *pointers)
    return loss, lse


def write_gradient(out, scale, logits, targets, lse, *options):
    """out (M, V/R) = scale d(row loss)/d(logits); `out` may be `logits`. scale (M,) in fp32, or None for 1."""
    rows = _rows(logits, targets, *options)
    scaling = pointer(scale), 0 if scale is None else scale.stride(0)
    call("cross_entropy_gradient", logits, *rows, lse.data_ptr(), *scaling, out.data_ptr(), out.stride(0))


def loss_and_gradient(out, scale, logits, targets, *options):
    """-> loss (M,), fp32; out as `write_gradient`. One pass over memory for as much of a row as fits on the chip."""
    shard = options[-1]
    if shard.group is not None:  # a collective stands between the two
        loss, lse = row_losses(logits, targets, *options)
        write_gradient(out, scale, logits, targets, lse, *options)
        return loss
    M = logits.shape[0]
    loss = empty((M,), torch.float32, logits.device)
    rows = _rows(logits, targets, *options)
    chosen = plan_for(M, shard.real, logits.element_size(), logits.device)
    outputs = pointer(scale), 0 if scale is None else scale.stride(0), loss.data_ptr(), out.data_ptr(), out.stride(0)
    numbers = chosen.threads, chosen.held, chosen.kept, chosen.ahead, chosen.blocks
    call("cross_entropy_loss_and_gradient", logits, *rows, *outputs, *numbers)
    return loss


def scale_(x, factor):
    """x *= factor (0-d fp32, on x's device), in place; x, contiguous, is not even read where factor is 1."""
    call("scale_unless_one", x, x.data_ptr(), DTYPES[x.dtype], x.numel(), factor.data_ptr())


cross_entropy_forward, cross_entropy_backward, cross_entropy_in_place = launchers(
    row_losses, write_gradient, loss_and_gradient, check=True
)
