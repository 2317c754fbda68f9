"""What a training step on a CPU leans on: GELU from cubics, and a heap of huge pages."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megakern.kernels.torch import native
from tests.test_cpu_kernels import needs_kernels

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@needs_kernels
@pytest.mark.parametrize("kind, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_of_every_bf16_value(kind, approximate):
    """At most half a unit in the last place, and the error of the cubics, from float64."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    wide = x.double().requires_grad_()
    y = F.gelu(wide, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), wide)
    dx = native.activation_backward(torch.ones_like(x), x, kind, torch.empty_like(x))
    found = ((native.activation_forward(x, kind, torch.empty_like(x)), y, 4e-6 * x.abs().double()), (dx, slope, 3e-5))
    for ours, wanted, error in found:
        wrong = (ours.double() - wanted).abs() > wanted.abs() * 2**-8 + error + 1e-37  # subnormals are taken for zero
        wrong &= x.abs().double() * torch.finfo(torch.float64).eps < 1  # the float64 formula itself overflows there
        assert not wrong.any(), f"{kind} of {x[wrong][:5].tolist()}: {ours[wrong][:5].tolist()}"


def test_the_heap_is_of_huge_pages():
    """The mapping in which the middle of a tensor lies that is made after keep_freed_memory has the
    kernel's flag for huge pages."""
    if platform.libc_ver()[0] != "glibc" or not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("no glibc, or a kernel without transparent huge pages")
    script = (
        "import torch, re; from megakern.train import machine; assert machine.keep_freed_memory()\n"
        "a = torch.ones(1 << 24).data_ptr() + (1 << 25)\n"
        "for text in re.split(r'(?m)^(?=[0-9a-f]+-[0-9a-f]+ )', open('/proc/self/smaps').read())[1:]:\n"
        "    first, last = (int(x, 16) for x in text.split()[0].split('-'))\n"
        "    if first <= a < last: print(' hg' in text)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_module_of_other_sources_is_not_used():
    script = (
        "import sys, types, megakern\n"
        "sys.modules['megakern._cpu'] = megakern._cpu = types.ModuleType('_cpu')\n"
        "from megakern.kernels.torch import native\n"
        "print(native.unavailable(), native.features())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "it was built from other sources than those of this package" in done.stdout
    assert "install megakern again" in done.stdout and done.stdout.strip().endswith("()")
