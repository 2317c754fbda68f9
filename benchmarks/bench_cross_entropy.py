"""cross_entropy beside PyTorch's. Bytes: read the logits; backward: read and write them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, options_for, run, sizes


def cases(options):
    for shape in options.shape:
        M, V = sizes(shape)
        logits, targets = draw(options, M, V), torch.randint(0, V, (M,), device=options.device)
        moved = logits.numel() * logits.element_size()
        contestants = {
            "megakern": lambda x, t=targets: mk.cross_entropy(x, t, backend=options.backend),
            "torch": lambda x, t=targets: F.cross_entropy(x.float(), t),
        }
        yield Case(shape, contestants, (logits,), moved, "B", 2 * moved)


if __name__ == "__main__":
    options = options_for("cross_entropy", ["3072x1024", "1024x50304"])
    run("cross_entropy", options, cases(options))
