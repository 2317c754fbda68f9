"""cross_entropy beside PyTorch's. Bytes: read the logits; backward: read and write them; both at once: the same."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

QUACK = ("quack", "quack.cross_entropy")
LIGER = ("Liger", "liger_kernel.transformers.functional")
SHAPES = {
    "cpu": ["3072x1024", "1024x50304"],
    "cuda": ["8192x131072", "16384x32000"],
    "tiny": ["3x8"],
}


def cases(options):
    for shape in options.shape:
        M, V = sizes(shape)
        logits, targets = draw(options, M, V), torch.randint(0, V, (M,), device=options.device)
        moved = logits.numel() * logits.element_size()
        contestants = {
            **ours(options, "cross_entropy", lambda x, backend, t=targets: mk.cross_entropy(x, t, backend=backend)),
            "torch": lambda x, t=targets: F.cross_entropy(x.float(), t),
            **peer(options, *QUACK, lambda quack, x, t=targets: quack.cross_entropy(x, t)),
        }
        yield Case(shape, contestants, (logits,), moved, "B", 2 * moved)


def with_gradient(loss):
    def call(x, **options):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x, **options), x)

    return call


def copied(loss):
    return lambda x, **options: loss(x.clone(), **options)


def over_itself(logits, targets):
    """One copy of the logits for all calls: the first call's gradient is right, the others go on from what it left."""
    leaf = logits.detach().clone().requires_grad_()

    def call(_, backend):
        loss = mk.cross_entropy(leaf.view_as(leaf), targets, in_place=True, backend=backend)
        return torch.autograd.grad(loss, leaf)

    return call


def both(options):
    for shape in options.shape:
        M, V = sizes(shape)
        logits, targets = draw(options, M, V), torch.randint(0, V, (M,), device=options.device)
        moved = logits.numel() * logits.element_size()
        call = with_gradient(lambda x, backend, t=targets: mk.cross_entropy(x, t, backend=backend))
        in_place = ours(options, "cross_entropy", over_itself(logits, targets))
        contestants = {
            **ours(options, "cross_entropy", call),
            **{f"{name} in place": function for name, function in in_place.items()},
            "torch": with_gradient(lambda x, t=targets: F.cross_entropy(x.float(), t)),
            **peer(options, *QUACK, lambda quack, x, t=targets: with_gradient(quack.cross_entropy)(x, target=t)),
            # Liger writes the gradient over the logits: each call gets a copy, which is a part of its time.
            **peer(options, *LIGER, lambda m, x, t=targets: with_gradient(copied(m.liger_cross_entropy))(x, target=t)),
        }
        yield Case(shape, contestants, (logits,), 2 * moved, "B", None)


def benchmark(options):
    run("cross_entropy", options, cases(options))
    run("cross_entropy, forward + backward", options, both(options))


if __name__ == "__main__":
    main("cross_entropy", benchmark, SHAPES)
