"""The emulator under the sanitizers of the C++ compiler: right kernels pass, steps outside and races are reported.

The probes run in the processes that the slow tests start: `python -m tests.sanitized`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megakern.kernels.cuda import module
from tests import simt
from tests.sanitized import PLANTED
from tests.test_simt import run_row
from tests.test_simt_async import small_copies

RIGHT = ["tests/test_simt.py", "tests/test_simt_async.py", "tests/test_gpu_ptx.py", "-k", f"not {PLANTED}"]


def sanitized(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.sanitized", sanitizer, "-q", "-s", *arguments]
    return subprocess.run(command, cwd=simt.ROOT, capture_output=True, text=True, timeout=1200)


def probe(function):
    return pytest.mark.skipif(simt.SANITIZER is None, reason="runs in a process of tests/sanitized.py")(function)


@probe
def test_probe_reads_behind_a_tensor():
    short, y = torch.zeros(64), torch.zeros(96)
    simt.cpu_library().run("reverse", [short, y], [96, 0])


@probe
def test_probe_without_a_barrier():
    run_row(simt.cpu_library(), "reverse", 96, 3)


@probe
def test_probe_without_a_trailing_barrier():
    small_copies(simt.cpu_library(), 5)


@probe
def test_probe_module_reads_behind_a_tensor():
    """The kernels that tests/kernels runs are those with the sanitizer."""
    x, y = torch.zeros(64), torch.zeros(96)
    module._simt.activation_forward(x.data_ptr(), y.data_ptr(), module.DTYPES[x.dtype], 0, 1, 96, 96, -1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_right_kernels_pass(sanitizer):
    run = sanitized(sanitizer, *RIGHT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "ERROR: AddressSanitizer" not in run.stderr and "WARNING: ThreadSanitizer" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "sanitizer, name, message, place",
    [
        ("address", "probe_reads_behind", "heap-buffer-overflow", "planted.cu"),
        ("address", "module_reads_behind", "heap-buffer-overflow", "activation_forward_kernel"),
        ("thread", "without_a_barrier", "data race", "planted.cu"),
        ("thread", "without_a_trailing_barrier", "data race", "planted_async.cu"),
    ],
)
def test_wrong_kernels_are_reported(sanitizer, name, message, place):
    run = sanitized(sanitizer, "tests/test_simt_sanitizers.py", "-k", f"probe and {name}")
    assert run.returncode != 0
    assert message in run.stderr and place in run.stderr, run.stdout[-2000:] + run.stderr[-4000:]
