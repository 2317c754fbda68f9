"""The compiled modules: what they need of the system, their stub, and their checks of every argument. No GPU needed.

Here `megakern._simt` stands for both: arguments are checked by the same code in `megakern._C`, which `make gates`
builds and tests as well.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from megakern.kernels.cuda import module, toolkit

ROOT = Path(__file__).resolve().parent.parent
BUILT = [name for name in ("_C", "_simt") if getattr(module, name) is not None]
F32 = 0  # code of a dtype

spec = importlib.util.spec_from_file_location("stubs", ROOT / "csrc/stubs.py")
stubs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stubs)
FUNCTIONS = stubs.functions((ROOT / "csrc/api.h").read_text())


def test_the_kernels_for_cpu_tensors_are_built_where_there_is_a_compiler():
    if shutil.which(os.environ.get("CXX", "c++")) is not None:
        assert module._simt is not None, f"{module.SIMT_ERROR}; run: make simt"


def test_the_stub_is_that_of_the_header():
    assert stubs.STUB.read_text() == stubs.stub((ROOT / "csrc/api.h").read_text()), "run: python csrc/stubs.py"


def test_arrays_and_structs_of_a_struct_are_counted_one_by_one():
    header = """
struct Pair {
  const void *a, *b;  // of (M, C)
  float scale;
};
struct Wide {
  Pair pair;
  int64_t strides[2], M;
  bool whole;
  float *sums, eps;
};
void wide(const Wide&, Place);
"""
    names = ["pair_a", "pair_b", "pair_scale", "strides_0", "strides_1", "M", "whole"]
    names += ["sums", "eps", "device", "stream"]
    assert [name for name, _ in stubs.functions(header)["wide"]] == names
    kinds = ["float", "int", "int", "int", "bool", "int", "float"]  # addresses are numbers, whatever lies there
    assert [kind for _, kind in stubs.functions(header)["wide"]][2:9] == kinds


@pytest.mark.parametrize("name", BUILT)
def test_a_module_has_the_functions_of_its_stub_with_as_many_arguments(name):
    compiled = getattr(module, name)
    bound = {n for n in dir(compiled) if not n.startswith("__")} - {"built", "check_pointers"}
    bound -= {"schedule", "set_schedule", "pretend_pointer"}  # of the emulator
    assert bound == set(FUNCTIONS)
    for function, arguments in FUNCTIONS.items():
        message = f"{function} takes {len(arguments) - 2} arguments, then device and stream; got 1"
        with pytest.raises(TypeError, match=re.escape(message)):
            getattr(compiled, function)(0)


@pytest.mark.parametrize("name", BUILT)
def test_a_module_knows_nothing_of_torch(name):
    """One build serves every version of torch: it loads without, and asks no library for a symbol of it."""
    path = getattr(module, name).__file__
    program = f"""
import sys, importlib.util
sys.modules["torch"] = None  # any import of it fails from here on
spec = importlib.util.spec_from_file_location("megakern.{name}", {path!r})
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)
print(compiled.built)
"""
    told = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == getattr(module, name).built
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed, so that the symbols cannot be listed")
    wanted = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    foreign = [line for line in wanted.splitlines() if re.search(r"torch|c10|\bat::|\bcu[A-Z]|\bcuda", line)]
    assert "PyTuple_" in wanted and not foreign, foreign
    libraries = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"Shared library: \[(\w+)", libraries))
    assert needed <= {"libstdc", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt", "ld"}, needed


@pytest.mark.skipif("_C" not in BUILT, reason="megakern._C is not built: make gates builds and tests it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: launches succeed")
def test_a_launch_without_a_driver_is_a_clean_error():
    x = torch.zeros(8)
    with pytest.raises(
        RuntimeError, match=r"launch of .*activation_forward_kernel.* grid \(1, 1, 1\) .* failed: CUDA driver"
    ):
        module._C.activation_forward(x.data_ptr(), x.data_ptr(), F32, 0, 1, 8, 8, 0, 0)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_launched_for_nothing(name, function):
    """All sizes zero and no addresses: done at once, or refused with a reason that names the function."""
    numbers = [0.0 if kind == "float" else 0 for _, kind in FUNCTIONS[function]]
    try:
        getattr(getattr(module, name), function)(*numbers)
    except ValueError as error:
        assert str(error).startswith(f"{function}: "), error


@pytest.mark.slow
def test_a_wheel_holds_what_users_need_and_is_small(tmp_path):
    """With the module for every architecture where there is nvcc; never the one for tests."""
    nvcc = toolkit.find_nvcc()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    environment = {**os.environ, toolkit.VARIABLE: "none" if nvcc is None else "all"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    compiled = {Path(name).name.split(".")[0] for name in held if name.endswith(".so")}
    assert compiled == {"_cpu"} | ({"_C"} if nvcc is not None else set())
    assert "megakern/_C.pyi" in held and "megakern/kernels/cuda/activation.py" in held
    assert {"megakern/_suite/benchmarks/suite.py", "megakern/_suite/benchmarks/peers/plain_gpt.py"} < set(held)
    assert not any(name.startswith("benchmarks/") for name in held)
    assert wheel.stat().st_size < 20e6, f"{wheel.stat().st_size / 1e6:.1f} MB"


# --- the checks of csrc/device/checks.h, through one function that has two inputs and one output ---

with_simt = pytest.mark.skipif(module._simt is None, reason="megakern._simt is not built: make simt")


class Call:
    """A sound call of swiglu_forward on tensors (4, 8) inside larger ones, one argument of which a test spoils."""

    def __init__(self):
        self.memory = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        self.base = base = self.memory.data_ptr()
        self.arguments = {"gate": base, "up": base + 1024, "y": base + 2048, "dtype": F32, "M": 4, "C": 8,
                          "gate_stride": 8, "up_stride": 8, "device": -1, "stream": 0}  # fmt: skip

    def __call__(self, **spoiled):
        module._simt.swiglu_forward(*{**self.arguments, **spoiled}.values())


@with_simt
def test_a_sound_call_is_accepted():
    def expect(*, gate=0, up=256, y=512, stride=8, **others):
        """What a call leaves in memory, with places in elements: y alone has changed."""
        call = Call()
        wanted = call.memory.clone()
        rows = [wanted.as_strided((4, 8), (stride, 1), place) for place in (gate, up)]
        wanted[y : y + 32] = (torch.nn.functional.silu(rows[0]) * rows[1]).flatten()
        places = {"gate": call.base + 4 * gate, "up": call.base + 4 * up, "y": call.base + 4 * y}
        call(**places, gate_stride=stride, up_stride=stride, **others)
        torch.testing.assert_close(call.memory, wanted, rtol=1e-6, atol=1e-6)

    expect()
    expect(stride=0)  # one row for all
    expect(y=0)  # in place
    expect(stride=64, up=8)  # columns of one wider matrix
    call = Call()
    before = call.memory.clone()
    call(M=0), call(C=0), call(M=0, gate=0, up=0, y=0)
    assert torch.equal(call.memory, before)


REFUSED = {
    "null": ({"up": 0}, "the address of up is null"),
    "misaligned": ({"y": "y + 2"}, "the address of y must be a multiple of 4, got"),
    "unknown dtype": ({"dtype": 9}, "dtype must be code 0 (fp32), 1 (bf16) or 2 (fp16), got 9"),
    "integer dtype": ({"dtype": 4}, "dtype must be code 0 (fp32), 1 (bf16) or 2 (fp16), got 4"),
    "negative size": ({"M": -1}, "M must be 0 to"),
    "huge size": ({"C": 1 << 60}, "C must be 0 to"),
    "huge stride": (
        {"up_stride": 1 << 60},
        "up of 4 rows 1152921504606846976 elements apart is larger than any memory",
    ),
    "backwards": ({"gate_stride": -8}, "the rows of gate must not run backwards, got stride -8"),
    "overlap": ({"y": "gate + 4"}, "y is written and must not overlap gate; give it memory of its own"),
    "one row of it": ({"y": "gate + 96"}, "y is written and must not overlap gate"),
    "in place at another stride": ({"y": "gate", "gate_stride": 16}, "y is written and must not overlap gate"),
    "a grid too large": (
        {"M": 1 << 40, "C": 2, "gate_stride": 0, "up_stride": 0, "y": 1 << 46},
        "takes 4294967296 blocks, and a grid has at most 2147483647",
    ),
}


@with_simt
@pytest.mark.parametrize("name", REFUSED)
def test_a_spoiled_call_is_refused(name):
    spoiled, message = REFUSED[name]
    call = Call()
    for key, value in spoiled.items():
        if isinstance(value, str):  # "gate + 4": 4 bytes behind the address of gate
            tensor, _, offset = value.partition(" + ")
            spoiled = {**spoiled, key: call.arguments[tensor] + int(offset or 0)}
    with pytest.raises(ValueError, match=re.escape(f"swiglu_forward: {message}")):
        call(**spoiled)


@with_simt
def test_an_output_with_rows_in_one_place_is_refused():
    """dgate and dup of swiglu_backward in one memory; and values that do not fit a field."""
    call = Call()
    at = [call.base + 256 * i for i in range(4)]
    with pytest.raises(ValueError, match="swiglu_backward: dup is written and must not overlap dgate"):
        module._simt.swiglu_backward(*at[:3], at[3], at[3], F32, 4, 8, 8, 8, 8, -1, 0)
    with pytest.raises(ValueError, match=r"swiglu_forward: argument 3 must be an integer that fits, got 4294967296"):
        call(dtype=1 << 32)
    with pytest.raises(ValueError, match=r"swiglu_forward: argument 0 must be an integer that fits, got -1"):
        call(gate=-1)
    with pytest.raises(ValueError, match=r"swiglu_forward: argument 4 must be an integer that fits, got 'four'"):
        call(M="four")
    with pytest.raises(ValueError, match=r"activation_forward: kind must be 0 to 3, got 4"):
        module._simt.activation_forward(at[0], at[1], F32, 4, 4, 8, 8, -1, 0)


@with_simt
def test_a_launch_releases_the_gil():
    x = torch.zeros(1 << 20)
    y = torch.empty_like(x)
    arguments = x.data_ptr(), y.data_ptr(), F32, 0, 1, x.numel(), x.numel(), -1, 0
    thread = threading.Thread(target=module._simt.activation_forward, args=arguments)
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    assert turns > 100, f"Python ran {turns} times during the launch"
