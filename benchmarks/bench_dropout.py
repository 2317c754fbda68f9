"""dropout + residual beside PyTorch's. Bytes: read x and residual, write y; backward: read dy, write dx.

The masks differ by design: ours is a function of seed and index.
"""

from __future__ import annotations

from torch.nn import functional as F

from benchmarks.common import Case, draw, options_for, run, sizes
from megakern.ops.dropout import dropout

P = 0.1


def cases(options):
    for shape in options.shape:
        x, residual = draw(options, *sizes(shape)), draw(options, *sizes(shape))
        moved = x.numel() * x.element_size()
        contestants = {
            "megakern": lambda x, r: dropout(x, P, 7, residual=r, backend=options.backend),
            "torch": lambda x, r: F.dropout(x, P) + r,
        }
        yield Case(shape, contestants, (x, residual), 3 * moved, "B", 2 * moved, comparable=False)


if __name__ == "__main__":
    options = options_for("dropout", ["3072x384", "2048x4096"])
    run("dropout, p = 0.1", options, cases(options))
