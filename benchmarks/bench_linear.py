"""linear beside PyTorch's, alone and with bias and GELU. FLOPs: 2 M N K; backward: 4 M N K.

On a GPU "cuBLAS" is PyTorch's own linear; quack's tunes itself at its first call. The shapes after the cubes are the
layers of a Llama 8B at 8192 tokens.
"""

from __future__ import annotations

from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer, why_not

SHAPES = {
    "cpu": ["3072x1536x384", "3072x384x1536", "2048x2048x2048"],
    "cuda": ["8192x8192x8192", "4096x4096x4096", "8192x6144x4096", "8192x28672x4096", "8192x4096x14336"],
    "tiny": ["3x8x5"],
}
FUSED_ON_CUDA = ["8192x16384x4096"]


def plain(options):
    for shape in options.shape:
        M, N, K = sizes(shape)
        inputs = (draw(options, M, K), draw(options, N, K))
        contestants = {
            **ours(options, "linear", lambda x, w, backend: mk.linear(x, w, backend=backend)),
            "cuBLAS" if options.device.type == "cuda" else "torch": F.linear,
            **peer(options, "quack", "quack.linear", lambda quack, x, w: quack.linear_func(x, w)),
        }
        yield Case(shape, contestants, inputs, 2 * M * N * K, "FLOP", 4 * M * N * K)


def fused(options):
    for shape in FUSED_ON_CUDA if options.shape == SHAPES["cuda"] else options.shape:
        M, N, K = sizes(shape)
        inputs = (draw(options, M, K), draw(options, N, K), draw(options, N))
        call = lambda x, w, b, backend: mk.linear(x, w, b, activation="gelu_tanh", backend=backend)  # noqa: E731
        contestants = {
            **ours(options, "linear", call),
            "torch": lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"),
            "quack": why_not("quack", options.device.type) or "has it as a part of its mlp, see bench_mlp",
        }
        yield Case(shape, contestants, inputs, 2 * M * N * K, "FLOP", 4 * M * N * K)


def benchmark(options):
    run("linear", options, plain(options))
    run("linear + bias + gelu_tanh", options, fused(options))


if __name__ == "__main__":
    main("linear", benchmark, SHAPES)
