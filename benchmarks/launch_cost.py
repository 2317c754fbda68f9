"""What a call costs the CPU before the driver has it: our checks, outputs, and arguments, without the kernel.

    python -m benchmarks.launch_cost

The C++ launchers on small CPU tensors, of the emulator's module (`make simt`) under its schedule "none", which runs no
thread. On a GPU the driver's launch comes on top, and outputs come from CUDA's allocator. Least and median of turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import megakern as mk
from megakern.kernels.cuda import activation, adamw, dropout, grad_norm, module, norm, rope
from megakern.kernels.cuda import cross_entropy as loss
from megakern.kernels.torch.cross_entropy import Shard

YARDSTICK = "torch.empty"
TENSORS = 32  # of a list: a small model's


def calls() -> dict[str, Callable]:
    """Launchers by name, for small inputs, behind the yardstick: one tensor by PyTorch."""
    M, C = 8, 64
    x, residual, dy = (torch.randn(M, C, dtype=torch.bfloat16) for _ in range(3))
    weight, bias = torch.ones(C, dtype=torch.bfloat16), torch.zeros(C, dtype=torch.bfloat16)
    targets, device = torch.zeros(M, dtype=torch.int64), x.device
    options = (-100, 0.0, 0.0, C, Shard(None, 0, C))
    mean, rstd = torch.zeros(M), torch.ones(M)
    q, k, angles = torch.randn(1, M, 4, 16), torch.randn(1, M, 2, 16), torch.randn(M, 8)
    many = [[torch.zeros(C) for _ in range(TENSORS)] for _ in range(4)]  # parameters, gradients, moments
    one = [column[:1] for column in many]
    step = ([], None, False, 1, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    return {
        YARDSTICK: lambda: torch.empty((M, C), dtype=torch.bfloat16, device=device),
        "layer norm": lambda: norm.norm_forward(x, weight, bias, None, 1e-5, True),
        "rms norm": lambda: norm.norm_forward(x, weight, None, None, 1e-5, False),
        "rms norm + residual": lambda: norm.norm_forward(x, weight, None, residual, 1e-5, False),
        "layer norm backward": lambda: norm.norm_backward(dy, None, x, weight, mean, rstd, True, True),
        "rms norm backward": lambda: norm.norm_backward(dy, None, x, weight, mean, rstd, False, False),
        "gelu": lambda: activation.activation_forward(x, "gelu"),
        "gelu backward": lambda: activation.activation_backward(dy, x, "gelu"),
        "swiglu": lambda: activation.swiglu_forward(x, residual),
        "swiglu backward": lambda: activation.swiglu_backward(dy, x, residual),
        "dropout + residual": lambda: dropout.dropout(x, residual, 0.1, 1, (0, M, M)),
        "rope": lambda: rope.rope(q, k, angles, angles, None, False, False),
        "rope in place": lambda: rope.rope(q, k, angles, angles, None, False, False, True),
        "row losses": lambda: loss.row_losses(x, targets, *options),
        "loss and gradient": lambda: loss.loss_and_gradient(x, None, x, targets, *options),
        "AdamW of one tensor": lambda: adamw.adamw(*one, *step),
        f"AdamW of {TENSORS} tensors": lambda: adamw.adamw(*many, *step),
        "gradient norm of one tensor": lambda: grad_norm.sum_of_squares(one[1]),
        f"gradient norm of {TENSORS} tensors": lambda: grad_norm.sum_of_squares(many[1]),
        "mk.rms_norm, the launcher included": lambda: mk.rms_norm(x, weight, backend="simt"),
    }


@contextmanager
def without_kernels() -> Iterator[None]:
    before = module._simt.schedule()
    module._simt.set_schedule("none")
    try:
        yield
    finally:
        module._simt.set_schedule(before)


def measure(functions: dict[str, Callable], turns: int = 15, repeats: int = 500) -> dict[str, list[float]]:
    """us a call in each turn, turn by turn through all functions."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # what the first call alone does
    for _ in range(turns):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return times


def main() -> int:
    if module._simt is None:
        print(f"{module.SIMT_ERROR}; make simt builds it", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with without_kernels():
        times = measure(calls())
    least = {name: min(turns) for name, turns in times.items()}
    for name, turns in times.items():
        of = least[name] / least[YARDSTICK]
        print(f"{name:<36}{least[name]:6.2f} us, median {statistics.median(turns):6.2f}, {of:5.2f} x {YARDSTICK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
