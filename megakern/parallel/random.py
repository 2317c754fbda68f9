"""Random numbers that do not depend on the layout: pure functions of (seed, name or site, logical index).

A key is a 64-bit integer. `fold` derives a key from a key and integers or names; `normal` gives the value of each
logical index of a full-size tensor, so that a rank computes only its slice and all layouts agree bit for bit. Dropout
masks come from the same idea in 32-bit arithmetic (`megakern/kernels/*/dropout.py`).
"""

from __future__ import annotations

import hashlib
import math

import torch

_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def fold(key: int, *parts: int | str) -> int:
    """A new non-negative 63-bit key from `key` and each part in turn; strings enter through SHA-256."""
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        key = _mix((key + 0x9E3779B97F4A7C15 * ((part & _MASK) + 1)) & _MASK)
    return key >> 1


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_tensor(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """float64 in the open interval (0, 1), one value for each int64 logical index, 53 random bits."""
    bits = _mix_tensor(index * _signed(0x9E3779B97F4A7C15) + _signed(_mix(key)))
    return (_shift_right(bits, 11).double() + 0.5) * 2.0**-53


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """Standard normal float64 for each int64 logical index (Box and Muller 1958, the cosine branch)."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(fold(key, 0), index)))
    return radius * torch.cos((2.0 * math.pi) * uniform(fold(key, 1), index))


def fill_normal(
    local: torch.Tensor, key: int, std: float, *, full_shape: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    """Fill `local`, the block at `offsets` of a tensor of `full_shape`, with N(0, std^2) of the logical indices.

    Works row block by row block, so that the float64 temporaries stay below 32 MB.
    """
    if local.ndim == 0 or local.numel() == 0:
        return
    inner = torch.zeros((), dtype=torch.int64, device=local.device)
    stride = 1
    for dim in range(local.ndim - 1, 0, -1):
        coordinate = torch.arange(local.shape[dim], device=local.device) + offsets[dim]
        shape = [1] * local.ndim
        shape[dim] = -1
        inner = inner + (coordinate * stride).view(shape)
        stride *= full_shape[dim]
    per_row = max(1, local[0].numel())
    rows = max(1, (1 << 22) // per_row)
    for start in range(0, local.shape[0], rows):
        block = local[start : start + rows]
        first = torch.arange(start, start + block.shape[0], device=local.device) + offsets[0]
        index = first.view(-1, *[1] * (local.ndim - 1)) * stride + inner
        block.copy_((normal(key, index.contiguous()) * std).to(local.dtype))
