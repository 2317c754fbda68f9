"""Layout-independent random numbers. No device needed."""

from __future__ import annotations

import math

import pytest
import torch

from megakern.parallel.random import fill_normal, fold, normal, uniform


def splitmix64(state: int) -> int:
    """Written out in Python integers, independently of the tensor code."""
    mask = (1 << 64) - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_uniform_is_splitmix64_of_the_index():
    key, indices = 1234, [0, 1, 7, 2**31, 2**40 + 3]
    base = splitmix64(key)
    expected = [((splitmix64((i * 0x9E3779B97F4A7C15 + base) % 2**64) >> 11) + 0.5) * 2.0**-53 for i in indices]
    assert uniform(key, torch.tensor(indices)).tolist() == expected


def test_normal_has_the_moments_of_a_standard_normal():
    x = normal(5, torch.arange(1_000_000))
    assert abs(x.mean().item()) < 4e-3 and abs(x.var().item() - 1) < 6e-3
    assert abs((x**4).mean().item() - 3) < 0.05
    below = (x < 1.0).double().mean().item()
    assert abs(below - 0.5 * (1 + math.erf(1 / math.sqrt(2)))) < 2e-3
    lagged = (x[1:] * x[:-1]).mean().item()
    assert abs(lagged) < 4e-3


@pytest.mark.parametrize("shape", [(96,), (24, 10), (12, 4, 6)])
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_slices_equal_the_full_tensor_bit_for_bit(shape, pieces):
    full = torch.empty(shape)
    fill_normal(full, 99, 0.02, full_shape=shape, offsets=(0,) * len(shape))
    for dim in range(len(shape)):
        if shape[dim] % pieces:
            continue
        step = shape[dim] // pieces
        for piece in range(pieces):
            offsets = tuple(piece * step if d == dim else 0 for d in range(len(shape)))
            local = torch.empty([step if d == dim else s for d, s in enumerate(shape)])
            fill_normal(local, 99, 0.02, full_shape=shape, offsets=offsets)
            assert torch.equal(local, full.narrow(dim, piece * step, step))


def test_blocks_do_not_change_the_values():
    tall = torch.empty(5000, 1024)  # more than one block of rows
    fill_normal(tall, 3, 1.0, full_shape=(5000, 1024), offsets=(0, 0))
    expected = normal(3, torch.arange(5000 * 1024)).float().view(5000, 1024)
    torch.testing.assert_close(tall, expected, rtol=1e-6, atol=0)


def test_fold_separates_keys():
    keys = {fold(seed, part) for seed in range(30) for part in [*range(30), "a", "b", "weight"]}
    assert len(keys) == 30 * 33
    assert all(0 <= key < 2**63 for key in keys)
