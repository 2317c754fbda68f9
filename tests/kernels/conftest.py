"""What all tests of compiled kernels share: the backend, its device, and guard bands of NaN around every output.

With a GPU, `cuda` and `triton` run there. Without one, `simt` runs here, and Triton's interpreter in a process of its
own with TRITON_INTERPRET=1, because Triton reads that variable when it is imported: `tests/test_triton_interpreter.py`.

A test that takes `backend` runs once for each backend that has the public op which its file names as OP. The mark
`only("triton")` keeps a test, a parameter, and a file through `pytestmark`, to the backend whose inner parts it looks
at.
"""

from __future__ import annotations

import os
import sys
from zlib import crc32

import pytest
import torch

from megakern.kernels import memory
from megakern.kernels.cuda import module
from megakern.ops.dispatch import UNAVAILABLE, ops_of
from tests.simt import SANITIZER, SCHEDULES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PRESENT = ("triton",) if INTERPRETED else ("cuda", "triton") if torch.cuda.is_available() else ("simt",)
BACKENDS = [backend for backend in PRESENT if UNAVAILABLE[backend] is None]

if INTERPRETED and "triton" in BACKENDS:
    from tests.kernels.interpreter import replace_once

    replace_once()

if SANITIZER and getattr(module._simt, "built", "") != f"with {SANITIZER} sanitizer":
    raise pytest.UsageError(f"the module of kernels is not the one with the {SANITIZER} sanitizer: {module._simt}")

GUARD = 128  # elements before and after: 256 bytes of bf16, so that outputs stay aligned
SENTINEL = 77  # in integer tensors, which have no NaN


def _backends(config) -> list[str]:
    asked = config.getoption("--kernel-backend")
    return [backend for backend in BACKENDS if asked in (None, backend)]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("only")
        op = metafunc.module.OP
        able = _backends(metafunc.config)
        known = [backend for backend in able if op in ops_of(backend) and (not only or backend in only.args)]
        metafunc.parametrize("backend", known)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that belong to no backend of this machine, instead of listing them as skipped."""
    items[:] = [item for item in items if item.path.parent.name != "kernels" or _belongs(item, _backends(config))]


def _belongs(item, here: list[str]) -> bool:
    if "backend" in item.fixturenames:
        parameters = item.callspec.params
        if "backend" not in parameters:  # none of its backends is here
            return False
        here = [parameters["backend"]]
    return all(set(mark.args) & set(here) for mark in item.iter_markers("only"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture
def unguarded(guards, monkeypatch):
    """For opcheck: outputs in storage of their own, as the fake implementation promises."""
    monkeypatch.setattr(memory, "allocate", torch.empty)


@pytest.fixture(autouse=True)
def schedule(request):
    """The order in which the emulator runs threads. The result is the same under each, so every test takes another."""
    if "simt" not in BACKENDS:
        yield
        return
    chosen = (
        request.config.getoption("--simt-schedule") or SCHEDULES[crc32(request.node.nodeid.encode()) % len(SCHEDULES)]
    )
    module._simt.set_schedule(chosen)
    request.node.add_report_section("setup", "schedule", f"of the emulator: {chosen}")
    yield
    module._simt.set_schedule("forward")


@pytest.fixture(autouse=True)
def compiled_afresh():
    """What one test compiled does not count for the next: dynamo gives up on the ninth version of a function."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Every tensor that a launcher allocates lies in a larger one of NaN; all guard bands must be whole at the end.

    The tensor itself starts as NaN too, so that an element which no program writes cannot pass for a result.
    """
    buffers = []

    def allocate(*sizes, dtype, device):
        shape = torch.empty(*sizes, device="meta").shape
        size = shape.numel()
        mark = float("nan") if dtype.is_floating_point else SENTINEL
        buffer = torch.full((size + 2 * GUARD,), mark, dtype=dtype, device=device)
        if type(buffer) is not torch.Tensor:  # a compiler traces the launcher: nothing runs, so nothing to guard
            return torch.empty(shape, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(memory, "allocate", allocate)
    yield buffers
    for buffer, size in buffers:
        for name, band in (("before", buffer[:GUARD]), ("after", buffer[GUARD + size :])):
            whole = band.isnan().all() if band.dtype.is_floating_point else (band == SENTINEL).all()
            assert whole, f"a kernel wrote {name} an output of {size} elements of {buffer.dtype}"
