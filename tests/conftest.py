"""Fixtures for all tests. Threads are limited so that tests repeat bit for bit and ranks do not fight over cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(function, size, *arguments)` runs a module-level function on `size` gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()
