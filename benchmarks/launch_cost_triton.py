"""What a launch of a Triton kernel costs the CPU before the driver has it, without a GPU.

    python -m benchmarks.launch_cost_triton

Our launchers on small CPU tensors. As on a GPU, kernels are compiled for sm_90, and Triton finds the machine code of
each call by its arguments; a stand-in for the driver takes them and does nothing. On a GPU the driver's launch comes on
top, and outputs come from CUDA's allocator. Least and median of turns; "launches" is how many kernels a call starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.launch_cost import YARDSTICK, measure
from megakern.kernels.torch.cross_entropy import Shard
from megakern.kernels.triton import activation, cross_entropy, linear, norm, rope


class Driver:
    """A GPU that takes every launch and runs none."""

    def __init__(self) -> None:
        self.launches, self.loaded, self.last = 0, 0, ()
        facts = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: facts, load_binary=self.load_binary)

    def load_binary(self, *binary) -> tuple[int, ...]:
        self.loaded += 1
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source, metadata):
        def take(*arguments):
            self.launches, self.last = self.launches + 1, arguments

        return take

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def without_gpu() -> Iterator[Driver]:
    """Within the block Triton's kernels are launched at a stand-in, which counts them and keeps the last."""
    before, stand_in = triton.runtime.driver._active, Driver()
    kernels = [value for module in (activation, cross_entropy, linear, norm, rope) for value in vars(module).values()]
    caches = {id(k): k for k in kernels if isinstance(k, triton.JITFunction)}
    kept = {key: dict(kernel.device_caches) for key, kernel in caches.items()}
    triton.runtime.driver.set_active(stand_in)
    for kernel in caches.values():
        kernel.device_caches.clear()
    try:
        yield stand_in
    finally:
        triton.runtime.driver._active = before
        for key, kernel in caches.items():  # what was loaded by the stand-in must never be launched
            kernel.device_caches.clear()
            kernel.device_caches.update(kept[key])


def calls() -> dict[str, Callable]:
    """Launchers by name, for small inputs, behind the yardstick: one tensor by PyTorch."""
    M, C = 8, 1024
    x, residual, dy = (torch.randn(M, C, dtype=torch.bfloat16) for _ in range(3))
    weight, bias = torch.ones(C, dtype=torch.bfloat16), torch.zeros(C, dtype=torch.bfloat16)
    mean, rstd, square = torch.zeros(M), torch.ones(M), torch.randn(C, C, dtype=torch.bfloat16)
    targets, options = torch.zeros(M, dtype=torch.int64), (-100, 0.0, 0.0, C, Shard(None, 0, C))
    q, k, angles = torch.randn(1, M, 4, 16), torch.randn(1, M, 2, 16), torch.randn(M, 8)
    return {
        YARDSTICK: lambda: torch.empty((M, C), dtype=torch.bfloat16, device=x.device),
        "layer norm": lambda: norm.norm_forward(x, weight, bias, None, 1e-5, True),
        "rms norm": lambda: norm.norm_forward(x, weight, None, None, 1e-5, False),
        "rms norm + residual": lambda: norm.norm_forward(x, weight, None, residual, 1e-5, False),
        "layer norm backward": lambda: norm.norm_backward(dy, None, x, weight, mean, rstd, True, True),
        "rms norm backward": lambda: norm.norm_backward(dy, None, x, weight, mean, rstd, False, False),
        "linear": lambda: linear.linear_forward(x, square, None, None, "", False),
        "linear + bias + gelu": lambda: linear.linear_forward(x, square, bias, None, "gelu", True),
        "swiglu": lambda: activation.swiglu_forward(x, residual),
        "rope": lambda: rope.rope(q, k, angles, angles, None, False, False),
        "row losses": lambda: cross_entropy.row_losses(x, targets, *options),
    }


def main() -> None:
    torch.set_num_threads(1)
    functions = calls()
    with without_gpu() as driver:
        times, started = measure(functions, repeats=200), {}
        for name, function in functions.items():
            before = driver.launches
            function()
            started[name] = driver.launches - before
    print(f"triton {triton.__version__}")
    for name, turns in times.items():
        print(f"{name:<24}{min(turns):6.2f} us, median {statistics.median(turns):6.2f}, launches {started[name]}")


if __name__ == "__main__":
    main()
