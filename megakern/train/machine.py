"""What this machine is: devices, cores, the precision that pays, its peak rate, memory; and CPU memory settings."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch

log = logging.getLogger("megakern")

# Dense bf16 / fp16 peaks in FLOP/s from the makers' data sheets, by a part of torch's device name.
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# bf16 is worth its rounding only where it is clearly faster: measured 0.6x of fp32 on a Xeon with AVX512-BF16 but
# without AMX, 3.5x on a Zen 5.
BF16_WORTH = 1.3


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory() -> int:
    """Bytes of main memory that the processes of this machine may use together: all of it, or a container's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroups of version 2 here, or "max"
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return physical


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """FLOP/s of a square matmul of the size that matters on this device: best of the repeats that fit in `seconds`."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2 * n**3 / best


def choose_precision(device: torch.device) -> tuple[str, str]:
    """The precision that `auto` means here, and the reason in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16"
        return "fp16", "this GPU has no bf16; fp16 with loss scaling"
    fp32, bf16 = matmul_rate(torch.float32, device), matmul_rate(torch.bfloat16, device)
    measured = f"a bf16 matmul runs at {bf16 / fp32:.1f} x the fp32 one here"
    return ("bf16", measured) if bf16 >= BF16_WORTH * fp32 else ("fp32", measured)


def peak_rate(dtype: torch.dtype, device: torch.device) -> tuple[float, str]:
    """FLOP/s that MFU divides by, for this process, and where the figure comes from."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in GPU_PEAKS.items():
            if part in name:
                return peak, f"{name} data sheet"
    return matmul_rate(dtype, device, 0.3), f"measured {str(dtype).removeprefix('torch.')} matmul"


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: GPU memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep large freed blocks, instead of giving each back to the kernel and faulting it in again,
    and take them from a heap of huge pages, where the kernel has those.

    A training step frees and allocates the same activations each time. Measured on a 6-layer, 384-wide GPT, two cores:
    kept blocks 1.2x tokens/s in fp32; huge pages 1.09x in bf16, whose passes over 28 MB go beyond what a TLB reaches in
    pages of 4 KiB. Returns False where the C library is not glibc (nothing changes there).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    libc = ctypes.CDLL(None, use_errno=True)
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20))  # -1: freed memory at its top stays
    kept = all(libc.mallopt(name, value) == 1 for name, value in settings)
    if kept and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        _extend_heap_in_huge_pages(libc, min(8 << 30, memory() // 4))
    return kept


def _extend_heap_in_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Extend malloc's heap by `size` bytes of addresses, for which the kernel shall take huge pages once they are used.

    They are a wish: where the kernel has none, or no room for so many addresses, all stays as it was.
    """
    huge_page, advice = 2 << 20, 14  # MADV_HUGEPAGE
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        first = -(-block // huge_page) * huge_page
        libc.madvise(first, (block + size - first) // huge_page * huge_page, advice)
        libc.free(block)
