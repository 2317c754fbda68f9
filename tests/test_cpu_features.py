"""`megakern._cpu` by itself: each kernel is refused where its instructions are missing, and needs no call before it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megakern.kernels.torch import native
from tests.test_cpu_kernels import needs_kernels, require

_cpu = native._cpu
SETS = {"avx512": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def products(which: str, product: int):
    """A call of attention with matrix products of that kind, on addresses that are none."""
    problem = _cpu.AttentionProblem(1, 4, 4, 1, 1, 8, -1, 0, 1.0, 0.0, 0, 1, 0, 0, 1)
    nowhere = _cpu.AttentionTensor(0, 32, 8, 8)
    tensors = _cpu.AttentionForward(*[nowhere] * 3, 0, 0)
    if which == "attention_backward":
        tensors = _cpu.AttentionBackward(*[nowhere] * 5, 0, *[nowhere] * 3)
    getattr(_cpu, which)(problem, tensors, int(product > 0), product)


def step():
    norm, linear = _cpu.BlockNorm(0, 0), _cpu.BlockLinear(0, 0)
    shape = _cpu.BlockShape(1, 1, 8, 1, 1, 8, 8, True, False, False, 1, -1, 1e-5, 1e-5)
    cache = _cpu.BlockCache(0, 0, 0, 0, 1, 16, 1)
    _cpu.block_step(shape, _cpu.BlockWeights(*[norm] * 4, *[linear] * 5), cache, _cpu.BlockRope(0, 0, 0), 0, 0, 0, 0, 1)


def calls() -> dict[str, tuple[str, object]]:
    """What each kernel needs, and a call of it with addresses that it refuses."""
    tensors = _cpu.AdamwProblem(0, 0, 0, 0, *[0.5] * 9, False, 1), [_cpu.AdamwTensors(0, 0, 0, 0, 0, 4)]
    product = _cpu.LinearProblem(4, 4, 4, 4, 0, False, 0, False, 1)
    rows = _cpu.LinearRowsProblem(1, 4, 4, 4, 0, 0, 0, 0, 1)
    gradient = _cpu.WeightGradientProblem(4, 4, 4, 4, 4, 0, False, 1)
    return {
        "linear_epilogue": ("avx512", lambda: _cpu.linear_epilogue(*[0] * 5, 0, 0, 4, 4, 1)),
        "column_sum": ("avx512", lambda: _cpu.column_sum(0, 0, 0, 4, 4, 4, 1)),
        "linear": ("amx_bf16", lambda: _cpu.linear(product, *[0] * 6)),
        "linear_rows": ("avx512", lambda: _cpu.linear_rows(rows, *[0] * 6)),
        "block_step": ("avx512", step),
        "weight_gradient": ("amx_bf16", lambda: _cpu.weight_gradient(gradient, *[0] * 4)),
        "activation_backward": ("avx512", lambda: _cpu.activation_backward(0, 0, 0, 0, 1, 4, 1)),
        "cross_entropy_sums": ("avx512", lambda: _cpu.cross_entropy_sums(*[0] * 6, 0, 4, 4, 4, 1)),
        "cross_entropy_gradient": ("avx512", lambda: _cpu.cross_entropy_gradient(*[0] * 7, 0, 4, 4, 4, 4, 1)),
        "norm_forward": ("avx512", lambda: _cpu.norm_forward(*[0] * 8, 0, 4, 4, 1e-5, True, 1)),
        "norm_backward": ("avx512", lambda: _cpu.norm_backward(*[0] * 9, 0, 4, 4, True, 1)),
        "adamw": ("avx512", lambda: _cpu.adamw(*tensors)),
        "sum_of_squares": ("avx512", lambda: _cpu.sum_of_squares([_cpu.Elements(0, 4, 0)], 1)),
        "attention_forward": ("avx512", lambda: products("attention_forward", 0)),
        "attention_forward in bf16": ("avx512_bf16", lambda: products("attention_forward", 1)),
        "attention_forward in tiles": ("amx_bf16", lambda: products("attention_forward", 2)),
        "attention_backward": ("avx512", lambda: products("attention_backward", 0)),
        "attention_backward in bf16": ("avx512_bf16", lambda: products("attention_backward", 1)),
        "attention_backward in tiles": ("amx_bf16", lambda: products("attention_backward", 2)),
    }


@needs_kernels
def test_every_kernel_is_refused_where_its_instructions_are_missing():
    kernels = {name for name in dir(_cpu) if callable(getattr(_cpu, name)) and name[0].islower()}
    needy = calls()
    assert kernels - {"features", "limit_features", "use_huge_pages"} == {name.split()[0] for name in needy}
    try:
        for name, (needed, call) in needy.items():
            lesser = list(SETS).index(needed)
            _cpu.limit_features(lesser)
            assert _cpu.features() == list(SETS)[:lesser]
            with pytest.raises(RuntimeError, match=f"{name.split()[0]}: needs {SETS[needed]}.* this processor lacks"):
                call()
            if needed in native.features():  # one set more, and it looks at its arguments
                _cpu.limit_features(lesser + 1)
                with pytest.raises(ValueError, match="is null"):
                    call()
    finally:
        _cpu.limit_features(len(SETS))


PRODUCT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("megakern._cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)
x, weight = torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(48, 32, dtype=torch.bfloat16)
y = torch.full((64, 48), torch.nan, dtype=torch.bfloat16)
problem = _cpu.LinearProblem(64, 48, 32, 32, 1, False, 0, False, 2)
_cpu.linear(problem, x.data_ptr(), weight.data_ptr(), 0, 0, 0, y.data_ptr())
torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=2**-8, atol=1e-4)
"""
NOT_ALLOWED = """
import ctypes, struct
# A filter of system calls: arch_prctl (158) with ARCH_REQ_XCOMP_PERM (0x1023) gets EPERM, all else passes.
program = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (6, 0, 0, 0x50001),
           (6, 0, 0, 0x7FFF0000)]
lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
whole = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(lines)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, whole, 0, 0):  # no new privileges; the filter
    raise SystemExit(77)
"""


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, _cpu.__file__], capture_output=True, text=True)


@needs_kernels
def test_a_product_in_tiles_is_the_first_call_of_a_process():
    """Linux lets a process use the tiles when it has asked for them, and kills one that has not."""
    require("amx_bf16")
    found = run(PRODUCT)
    assert found.returncode == 0, (found.returncode, found.stderr)


@needs_kernels
def test_tiles_that_the_system_does_not_allow_are_an_exception():
    require("amx_bf16")
    found = run(NOT_ALLOWED + PRODUCT)
    if found.returncode == 77:
        pytest.skip("this system takes no filter of system calls")
    wanted = "RuntimeError: linear: needs AMX-BF16, which this processor lacks or its system does not allow"
    assert found.returncode == 1 and wanted in found.stderr, (found.returncode, found.stderr)
