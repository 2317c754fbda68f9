"""linear with bias and GELU beside PyTorch's two calls. FLOPs: 2 M N K; backward: 4 M N K."""

from __future__ import annotations

from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, options_for, run, sizes


def cases(options):
    for shape in options.shape:
        M, N, K = sizes(shape)
        inputs = (draw(options, M, K), draw(options, N, K), draw(options, N))
        contestants = {
            "megakern": lambda x, w, b: mk.linear(x, w, b, activation="gelu_tanh", backend=options.backend),
            "torch": lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"),
        }
        yield Case(shape, contestants, inputs, 2 * M * N * K, "FLOP", 4 * M * N * K)


if __name__ == "__main__":
    options = options_for("linear", ["3072x1536x384", "3072x384x1536", "2048x2048x2048"])
    run("linear + bias + gelu_tanh", options, cases(options))
