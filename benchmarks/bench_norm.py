"""layer_norm and rms_norm beside PyTorch's. Bytes: read x, write y; backward: read x and dy, write dx.

With residual: read x and the residual, write y and their sum; backward: read the sum and both gradients, write dx.
"""

from __future__ import annotations

from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer, why_not

SHAPES = {
    "cpu": ["3072x384", "2048x768", "1024x4096"],
    "cuda": ["8192x8192", "32768x4096", "65536x1024", "4096x32768", "128x1024"],
    "tiny": ["3x8"],
}


LIGER = ("Liger", "liger_kernel.transformers.functional")
QUACK = ("quack", "quack.rmsnorm")


def fused_add(liger, x, weight, residual):
    return liger.liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)


def layer_norms(options):
    for shape in options.shape:
        M, C = sizes(shape)
        x, weight, bias = draw(options, M, C), draw(options, C), draw(options, C)
        moved = x.numel() * x.element_size()
        contestants = {
            **ours(options, "layer_norm", lambda x, w, b, backend: mk.layer_norm(x, w, b, backend=backend)),
            "torch": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
            **peer(options, *LIGER, lambda liger, x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)),
            "quack": why_not("quack", options.device.type) or "its layer norm has no bias and no backward pass",
        }
        yield Case(shape, contestants, (x, weight, bias), 2 * moved, "B", 3 * moved)


def rms_norms(options):
    for shape in options.shape:
        M, C = sizes(shape)
        x, weight = draw(options, M, C), draw(options, C)
        moved = x.numel() * x.element_size()
        contestants = {
            **ours(options, "rms_norm", lambda x, w, backend: mk.rms_norm(x, w, backend=backend)),
            "torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            **peer(options, *LIGER, lambda liger, x, w: liger.liger_rms_norm(x, w, 1e-6, in_place=False)),
            **peer(options, *QUACK, lambda quack, x, w: quack.rmsnorm(x, w, eps=1e-6)),
        }
        yield Case(shape, contestants, (x, weight), 2 * moved, "B", 3 * moved)


def plain_residual(x, w, r):
    h = x + r
    return F.rms_norm(h, w.shape, w, 1e-6), h


def rms_norms_with_residual(options):
    for shape in options.shape[:2]:
        M, C = sizes(shape)
        x, weight, residual = draw(options, M, C), draw(options, C), draw(options, M, C)
        moved = x.numel() * x.element_size()
        contestants = {
            **ours(options, "rms_norm", lambda x, w, r, backend: mk.rms_norm(x, w, residual=r, backend=backend)),
            "torch": plain_residual,
            **peer(options, *LIGER, fused_add),
            **peer(options, *QUACK, lambda quack, x, w, r: quack.rmsnorm(x, w, residual=r, eps=1e-6, prenorm=True)),
        }
        yield Case(shape, contestants, (x, weight, residual), 4 * moved, "B", 4 * moved)


def benchmark(options):
    run("layer_norm", options, layer_norms(options))
    run("rms_norm", options, rms_norms(options))
    run("rms_norm + residual", options, rms_norms_with_residual(options))


if __name__ == "__main__":
    main("norm", benchmark, SHAPES)
