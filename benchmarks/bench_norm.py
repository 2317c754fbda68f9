"""layer_norm and rms_norm beside PyTorch's. Bytes: read x, write y; backward: read x and dy, write dx."""

from __future__ import annotations

from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, options_for, run, sizes


def cases(options, rms: bool):
    for shape in options.shape:
        M, C = sizes(shape)
        x, weight, bias = draw(options, M, C), draw(options, C), draw(options, C)
        moved = x.numel() * x.element_size()
        if rms:
            ours, theirs = (
                (lambda x, w: mk.rms_norm(x, w, backend=options.backend)),
                (lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
            )
            yield Case(shape, {"megakern": ours, "torch": theirs}, (x, weight), 2 * moved, "B", 3 * moved)
        else:
            ours = lambda x, w, b: mk.layer_norm(x, w, b, backend=options.backend)  # noqa: E731
            theirs = lambda x, w, b: F.layer_norm(x, w.shape, w, b)  # noqa: E731
            yield Case(shape, {"megakern": ours, "torch": theirs}, (x, weight, bias), 2 * moved, "B", 3 * moved)


if __name__ == "__main__":
    options = options_for("norm", ["3072x384", "2048x768", "1024x4096"])
    run("layer_norm", options, cases(options, rms=False))
    run("rms_norm", options, cases(options, rms=True))
