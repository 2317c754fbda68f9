"""Many tensors in one launch: a table of their addresses, and a map from programs to pieces of them."""

from __future__ import annotations

import functools

import torch
import triton.language as tl

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int16: tl.int16,
}


def address_table(rows: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """rows of k tensors -> int64 (rows, k + 1) on their device: the k addresses, and the number of elements.

    The tensors must be contiguous and outlive the launch. One copy to the device, which does not wait for it.
    """
    device = rows[0][0].device
    values = [[*(tensor.data_ptr() for tensor in row), row[0].numel()] for row in rows]
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def pieces(rows: list[tuple[torch.Tensor, ...]], size: int) -> torch.Tensor:
    """int32 (pieces, 2): for each program its row in the table and which piece of `size` elements of it."""
    return _pieces(tuple(row[0].numel() for row in rows), size, rows[0][0].device)


@functools.lru_cache(maxsize=64)  # the sizes of a model's parameters do not change from step to step
def _pieces(counts: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    owners = torch.tensor(counts, dtype=torch.int64).add_(size - 1).div_(size, rounding_mode="floor")
    row = torch.repeat_interleave(torch.arange(len(counts)), owners)
    first = torch.repeat_interleave(owners.cumsum(0) - owners, owners)
    return torch.stack([row, torch.arange(len(row)) - first], 1).to(device=device, dtype=torch.int32)


def aligned(rows: list[tuple[torch.Tensor, ...]]) -> bool:
    """Do all tensors start at a multiple of 16 bytes, so that loads of 16 bytes are legal?"""
    return all(tensor.data_ptr() % 16 == 0 for row in rows for tensor in row)
