"""MEGAKERN_CHECK_POINTERS: a launch names the tensor that lies elsewhere. The emulator plays the driver: no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import megakern as mk
from megakern.kernels.cuda import module
from megakern.kernels.cuda.grad_norm import sum_of_squares

simt = module._simt
pytestmark = pytest.mark.skipif(simt is None, reason=module.SIMT_ERROR)


@pytest.fixture
def pretend():
    """`pretend(x, device)`: x seems to be memory of that device, -1: of the host."""
    simt.check_pointers(True)
    yield lambda x, device: simt.pretend_pointer(x.data_ptr(), device)
    simt.check_pointers(False)
    simt.pretend_pointer(0, 0)


@pytest.mark.parametrize("device, place", [(1, "device 1"), (-1, "the host's memory")])
def test_the_tensor_is_named(device, place, pretend):
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    expected = torch.nn.functional.silu(gate) * up
    pretend(up, device)
    message = f"swiglu_forward: up must lie on device -1, where the launch is, got an address of {place}; move it there"
    with pytest.raises(ValueError, match=message):
        mk.swiglu(gate, up, backend="simt")
    pretend(torch.empty(1), device)  # another tensor
    torch.testing.assert_close(mk.swiglu(gate, up, backend="simt"), expected)


def test_a_tensor_of_a_list_is_named(pretend):
    tensors = [torch.ones(4), torch.ones(5)]
    pretend(tensors[1], 1)
    with pytest.raises(
        ValueError, match="tensor 1 must lie on device -1, where the launch is, got an address of device 1"
    ):
        sum_of_squares(tensors)


def test_the_variable_switches_it_on():
    code = """
import torch, megakern as mk
from megakern.kernels.cuda.module import _simt
x = torch.ones(2, 8)
_simt.pretend_pointer(x.data_ptr(), 1)
mk.swiglu(x, x.clone(), backend="simt")
"""
    for value, refused in (("1", True), ("0", False)):
        words = ["env", f"MEGAKERN_CHECK_POINTERS={value}", sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True)
        assert ("gate must lie on device -1" in done.stderr) == refused, done.stderr
        assert (done.returncode != 0) == refused
