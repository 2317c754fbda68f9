"""The test kernels of csrc/simt/tests as a library: by g++ for the emulator, by nvcc for a GPU, once for each content.

`library().run("case", tensors, numbers)` calls a case and raises RuntimeError with its message.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

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


def build(command: list[str], language: str, sources: list[Path]) -> Path:
    """Compiles what changed, two files at a time, and links; processes that want the same wait for one another."""
    headers = [*CSRC.glob("*.h"), *CSRC.glob("device/*"), *CSRC.glob("simt/**/*.h")]
    common = hashlib.sha256(" ".join(command).encode() + b"".join(path.read_bytes() for path in sorted(headers)))
    folder = ROOT / "build" / "simt-tests"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects, waiting = [], []
        for source in sources:
            own = common.copy()
            own.update(source.read_bytes())
            target = folder / f"{source.stem}-{own.hexdigest()[:16]}.o"
            objects.append(target)
            if not target.exists():
                waiting.append([*command, f"-I{CSRC}", "-x", language, "-c", str(source), "-o", f"{target}.new"])
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
        library = folder / f"cases-{name}.so"
        if not library.exists():
            link = [word for word in command if not word.startswith("-std")]
            subprocess.run([*link, "-shared", *map(str, objects), "-o", f"{library}.new"], check=True)
            library.with_name(library.name + ".new").rename(library)
    return library


@cache
def library() -> Library:
    sources = [*CSRC.glob("simt/*.cpp"), *CSRC.glob("simt/tests/*.cpp"), *CSRC.glob("simt/tests/*.cu")]
    command = [os.environ.get("CXX", "c++"), *GCC, "-DMEGAKERN_SIMT"]
    return Library(build(command, "c++", sorted(sources)))


@cache
def gpu_library() -> Library:
    sources = [CSRC / "simt/tests" / name for name in ("cases.cpp", "golden.cu", "golden_wgmma.cu", "rows.cu")]
    return Library(build([str(toolkit.find_nvcc()), *NVCC], "cu", sources), torch.cuda.current_device())
