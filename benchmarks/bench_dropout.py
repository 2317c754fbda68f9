"""dropout + residual beside PyTorch's. Bytes: read x and residual, write y; backward: read dy, write dx.

The masks differ by design: ours is a function of seed and index.
"""

from __future__ import annotations

from torch.nn import functional as F

from benchmarks.common import Case, draw, main, ours, run, sizes
from megakern.ops.dropout import dropout

P = 0.1
SHAPES = {
    "cpu": ["3072x384", "2048x4096"],
    "cuda": ["8192x8192"],
    "tiny": ["3x8"],
}


def cases(options):
    for shape in options.shape:
        x, residual = draw(options, *sizes(shape)), draw(options, *sizes(shape))
        moved = x.numel() * x.element_size()
        contestants = {
            **ours(options, "dropout", lambda x, r, backend: dropout(x, P, 7, residual=r, backend=backend)),
            "torch": lambda x, r: F.dropout(x, P) + r,
        }
        yield Case(shape, contestants, (x, residual), 3 * moved, "B", 2 * moved, comparable=False)


def benchmark(options):
    run("dropout, p = 0.1", options, cases(options))


if __name__ == "__main__":
    main("dropout", benchmark, SHAPES)
