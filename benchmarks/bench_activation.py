"""gelu and swiglu beside PyTorch's. Bytes: gelu reads 1 and writes 1 (backward 2 and 1); swiglu 2 and 1 (3 and 2)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer, why_not

SHAPES = {
    "cpu": ["3072x1536", "1024x16384"],
    "cuda": ["8192x14336", "128x1024"],
    "tiny": ["3x8"],
}


class Lent(torch.autograd.Function):
    """x -> `copy` of it, in memory of its own."""

    @staticmethod
    def forward(ctx, x, copy):
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def liger_swiglu(*inputs):
    """Its backward pass writes over what it was given: copies, made once, outside of what is timed."""
    copies = [x.detach().clone() for x in inputs]
    return lambda m, *inputs: m.liger_swiglu(*(Lent.apply(x, copy) for x, copy in zip(inputs, copies, strict=True)))


def cases(options, gated: bool):
    for shape in options.shape:
        x, up = draw(options, *sizes(shape)), draw(options, *sizes(shape))
        moved = x.numel() * x.element_size()
        if gated:
            contestants = {
                **ours(options, "swiglu", lambda g, u, backend: mk.swiglu(g, u, backend=backend)),
                "torch": lambda g, u: F.silu(g) * u,
                **peer(options, "Liger", "liger_kernel.transformers.functional", liger_swiglu(x, up)),
            }
            yield Case(shape, contestants, (x, up), 3 * moved, "B", 5 * moved)
        else:
            contestants = {
                **ours(options, "gelu", lambda x, backend: mk.gelu(x, approximate="tanh", backend=backend)),
                "torch": lambda x: F.gelu(x, approximate="tanh"),
                "Liger": why_not("Liger", options.device.type) or "has gelu only as a factor: geglu",
            }
            yield Case(shape, contestants, (x,), 2 * moved, "B", 3 * moved)


def benchmark(options):
    run("gelu_tanh", options, cases(options, gated=False))
    run("swiglu", options, cases(options, gated=True))


if __name__ == "__main__":
    main("activation", benchmark, SHAPES)
