"""The test kernels of csrc/simt/tests as a library: by g++ for the emulator, by nvcc for a GPU, once for each content.

`cpu_library().run("case", tensors, numbers)` calls a case and raises RuntimeError with its message.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from megakern.kernels.cuda import toolkit

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "pct:1", "pct:2", "pct:3", "pct:4", "pct:5")

GCC = [
    "-std=c++17",
    "-O3",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
SANITIZERS = {
    "address": ("-fsanitize=address,undefined -fno-sanitize-recover=undefined", "-DMEGAKERN_ASAN"),
    "thread": ("-fsanitize=thread", "-DMEGAKERN_TSAN"),
}
SANITIZER = os.environ.get("SIMT_SANITIZER")  # set by tests/sanitized.py
after_an_error = pytest.mark.skipif(
    SANITIZER == "thread", reason="threads that an error stops leave their accesses unordered"
)
NVCC = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class Library:
    """One built library. `device` -1 runs on CPU tensors."""

    def __init__(self, path: Path, device: int = -1):
        self.device = device
        self.functions = ctypes.CDLL(str(path))

    def _call(self, function, *arguments):
        message = ctypes.create_string_buffer(4096)
        if function(*arguments, message, ctypes.c_int64(len(message))):
            raise RuntimeError(message.value.decode())

    def run(self, case: str, tensors=(), numbers=()):
        pointers = (ctypes.c_void_p * max(1, len(tensors)))(*(tensor.data_ptr() for tensor in tensors))
        values = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
        stream = torch.cuda.current_stream().cuda_stream if self.device >= 0 else None
        name = ctypes.c_char_p(case.encode())
        self._call(self.functions.megakern_case, name, self.device, ctypes.c_void_p(stream), pointers, values)

    def schedule(self, schedule: str):
        self._call(self.functions.megakern_schedule, ctypes.c_char_p(schedule.encode()))


def build(command: list[str], sources: dict[Path, list[str]], link: list[str], target: str = "cases-{}.so") -> Path:
    """Compiles what changed, two files at a time, and links; processes that want the same wait for one another.

    `sources`: files, each with flags of its own.
    """
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *CSRC.glob("device/*"), *CSRC.glob("simt/**/*.h")]
    common = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(headers)))
    folder = ROOT / "build" / "simt-tests"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects, waiting = [], []
        for source, flags in sources.items():
            words = [*command, f"-I{CSRC}", *flags, "-c", str(source), "-o"]
            own = common.copy()
            own.update(" ".join(words).encode() + source.read_bytes())
            objects.append(folder / f"{source.stem}-{own.hexdigest()[:16]}.o")
            if not objects[-1].exists():
                waiting.append([*words, f"{objects[-1]}.new"])
        running: list[subprocess.Popen] = []
        while waiting or running:
            while waiting and len(running) < 2:
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                running.append(subprocess.Popen(waiting.pop(), text=True, **pipes))
            process = running.pop(0)
            output, _ = process.communicate()
            if process.returncode or output.strip():
                raise RuntimeError(f"{' '.join(process.args)}\n{output}")
            new = Path(process.args[-1])
            new.rename(new.with_suffix(""))
        name = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
        library = folder / target.format(name)
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            subprocess.run([command[0], *link, "-shared", *map(str, objects), "-o", f"{library}.new"], check=True)
            library.with_name(library.name + ".new").rename(library)
    return library


def build_for_cpu(sources: list[Path], target: str = "cases-{}.so", flags: tuple[str, ...] = ()) -> Path:
    """Kernels with the sanitizer, the emulator without."""
    instrument, macro = SANITIZERS[SANITIZER] if SANITIZER else ("", "")
    kernels = ["-O1", "-fno-omit-frame-pointer", *instrument.split()] if SANITIZER else []
    emulator = [macro] if SANITIZER else []
    files = {path: [*emulator, "-x", "c++"] for path in sorted(CSRC.glob("simt/*.cpp"))}
    files |= {path: [*kernels, *flags, "-x", "c++"] for path in sorted(sources)}
    return build([os.environ.get("CXX", "c++"), *GCC, "-DMEGAKERN_SIMT"], files, instrument.split(), target)


@cache
def cpu_library() -> Library:
    return Library(build_for_cpu([*CSRC.glob("simt/tests/*.cpp"), *CSRC.glob("simt/tests/*.cu")]))


@cache
def gpu_library() -> Library:
    names = ("cases.cpp", "golden.cu", "golden_wgmma.cu", "rows.cu")
    sources = {CSRC / "simt/tests" / name: ["-x", "cu"] for name in names}
    return Library(build([str(toolkit.find_nvcc()), *NVCC], sources, NVCC[2:]), torch.cuda.current_device())
