"""What all tests of Triton kernels share: the device, and guard bands of NaN around every output.

With a GPU the kernels run there. Without one they run in Triton's interpreter, in a process of their own with
TRITON_INTERPRET=1, because Triton reads that variable when it is imported: see `tests/test_triton_interpreter.py`.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = importlib.util.find_spec("triton") is not None

if not HAVE_TRITON or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]

GUARD = 128  # elements before and after: 256 bytes of bf16, so that outputs stay aligned
SENTINEL = 77  # in integer tensors, which have no NaN


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def unguarded(guards, monkeypatch):
    """For opcheck: outputs in storage of their own, as the fake implementation promises."""
    from megakern.kernels.triton import launch

    monkeypatch.setattr(launch, "allocate", torch.empty)


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Every tensor that a launcher allocates lies in a larger one of NaN; all guard bands must be whole at the end.

    The tensor itself starts as NaN too, so that an element which no program writes cannot pass for a result.
    """
    from megakern.kernels.triton import launch

    buffers = []

    def allocate(shape, *, dtype, device):
        size = torch.Size(shape).numel()
        mark = float("nan") if dtype.is_floating_point else SENTINEL
        buffer = torch.full((size + 2 * GUARD,), mark, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(launch, "allocate", allocate)
    yield buffers
    for buffer, size in buffers:
        for name, band in (("before", buffer[:GUARD]), ("after", buffer[GUARD + size :])):
            whole = band.isnan().all() if band.dtype.is_floating_point else (band == SENTINEL).all()
            assert whole, f"a kernel wrote {name} an output of {size} elements of {buffer.dtype}"
