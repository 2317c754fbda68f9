"""linear_cross_entropy, forward and backward together, beside PyTorch's two calls. FLOPs: 6 M V K."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

SHAPES = {
    "cpu": ["3072x1024x384", "2048x4096x384", "512x50304x768"],
    "cuda": ["8192x131072x4096"],
    "tiny": ["3x8x5"],
}


def with_gradients(loss):
    def call(x, weight, **options):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(loss(x, weight, **options), (x, weight))

    return call


LIGER = ("Liger", "liger_kernel.transformers.functional")


QUACK = ("quack", "quack.linear_cross_entropy")


def quack(module, x, weight, targets):
    return with_gradients(lambda x, w: module.chunked_linear_cross_entropy(x, w, targets))(x, weight)


def liger(module, x, weight, targets):
    return with_gradients(lambda x, w: module.liger_fused_linear_cross_entropy(x, w, targets))(x, weight)


def cases(options):
    for shape in options.shape:
        M, V, K = sizes(shape)
        # Logits of the size that models have: larger ones give softmax values that are denormal, and slow for a CPU.
        x, weight = draw(options, M, K), draw(options, V, K).detach().mul(K**-0.5)
        targets = torch.randint(0, V, (M,), device=options.device)
        call = with_gradients(lambda x, w, backend, t=targets: mk.linear_cross_entropy(x, w, t, backend=backend))
        contestants = {
            **ours(options, "linear_cross_entropy", call),
            "torch": with_gradients(lambda x, w, t=targets: F.cross_entropy(F.linear(x, w).float(), t)),
            **peer(options, *LIGER, lambda m, x, w, t=targets: liger(m, x, w, t)),
            **peer(options, *QUACK, lambda m, x, w, t=targets: quack(m, x, w, t)),
        }
        yield Case(shape, contestants, (x, weight), 6.0 * M * V * K, "FLOP", None)


def benchmark(options):  # the gradient is made in the forward pass: one figure for both
    run("linear_cross_entropy, forward + backward", options, cases(options))


if __name__ == "__main__":
    main("linear_cross_entropy", benchmark, SHAPES)
