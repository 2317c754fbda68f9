"""Launcher of csrc/grad_norm.cu: two launches, whatever the tensors and their dtypes."""

from __future__ import annotations

from array import array

import torch

from megakern.kernels.cuda.module import DTYPES, call
from megakern.kernels.memory import empty

SMALLEST = 4096  # elements of a piece: four chunks of 16 bytes of fp32 for each of 256 threads
PIECES = 4096  # about as many: four for each block that an H200 runs at a time. Never the GPU's own count: see below


def piece_of(elements: int) -> int:
    """Elements of a piece. From sizes alone, so that the sum is the same on every GPU."""
    return max(SMALLEST, -(-elements // (PIECES * 1024)) * 1024)


def sum_of_squares(tensors):
    """-> 0-d, fp32."""
    device = tensors[0].device
    flat = [tensor.contiguous() for tensor in tensors if tensor.numel() > 0]
    counts = [tensor.numel() for tensor in flat]
    piece = piece_of(sum(counts))
    pieces = sum(-(-count // piece) for count in counts)
    sums, out = empty((pieces,), torch.float32, device), empty((), torch.float32, device)
    table = array("q")
    for tensor, count in zip(flat, counts, strict=True):
        table.extend((tensor.data_ptr(), count, DTYPES[tensor.dtype]))
    numbers = table.buffer_info()[0], len(flat), piece, pieces
    call("sum_of_squares", out, *numbers, sums.data_ptr(), out.data_ptr())
    return out
