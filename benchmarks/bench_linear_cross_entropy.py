"""linear_cross_entropy, forward and backward together, beside PyTorch's two calls. FLOPs: 6 M V K."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, options_for, run, sizes


def with_gradients(loss):
    def call(x, weight):
        return torch.autograd.grad(loss(x, weight), (x, weight))

    return call


def cases(options):
    for shape in options.shape:
        M, V, K = sizes(shape)
        # Logits of the size that models have: larger ones give softmax values that are denormal, and slow for a CPU.
        x = draw(options, M, K).requires_grad_()
        weight = draw(options, V, K).detach().mul(K**-0.5).requires_grad_()
        targets = torch.randint(0, V, (M,), device=options.device)
        contestants = {
            "megakern": with_gradients(
                lambda x, w, t=targets: mk.linear_cross_entropy(x, w, t, backend=options.backend)
            ),
            "torch": with_gradients(lambda x, w, t=targets: F.cross_entropy(F.linear(x, w).float(), t)),
        }
        yield Case(shape, contestants, (x, weight), 6.0 * M * V * K, "FLOP", 6.0 * M * V * K)


if __name__ == "__main__":
    options = options_for("linear_cross_entropy", ["3072x1024x384", "2048x4096x384", "512x50304x768"])
    options.backward = False  # the gradient is made in the forward pass: one figure for both
    run("linear_cross_entropy, forward + backward", options, cases(options))
