"""The feed-forward half of a block, and each of its fused products, beside PyTorch's product and separate kernels.

Shapes are M x N x K: x (M, K), inner layer (M, N). FLOPs: a product 2 M N K. Gradients that a fused product makes are
rows of their own, timed as forward passes: "dz" is the derivative in the epilogue of dy W, "dW, db" the bias
gradient from the tiles of dy that dy^T x reads.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer, why_not
from megakern.ops.linear import weight_gradient
from megakern.ops.mlp import activation_gradient, linear_activated, linear_after

SHAPES = {
    "cpu": ["3072x1536x384", "2048x2048x2048"],
    "cuda": ["8192x16384x4096", "8192x14336x4096", "4096x4096x1024"],
    "tiny": ["3x8x8"],
}
aten = torch.ops.aten


def weight(options, *shape):
    return draw(options, *shape).detach().mul_(shape[-1] ** -0.5).requires_grad_("backward" in options.passes)


def on(backend):
    return mk.use_backend(backend) if backend else nullcontext()


def plain(x, w1, b1, w2):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2)


def plain_gated(x, gate, up, w2):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), w2)


def quack(options, gated: bool):
    if gated:
        reason = "takes gate and up as the even and odd rows of one weight"
        return {"quack": why_not("quack", options.device.type) or reason}
    call = lambda m, x, w1, b1, w2: m.mlp_func(x, w1, w2, "gelu_tanh_approx", bias1=b1)  # noqa: E731
    return peer(options, "quack", "quack.mlp", call)


def two_layers(options, gated: bool):
    def call(x, *weights, backend):
        *first, w2 = weights
        with on(backend):
            if gated:
                return linear_after(linear_activated(x, [(w, None) for w in first], "swiglu"), w2)
            return linear_after(linear_activated(x, [tuple(first)], "gelu_tanh"), w2)

    for shape in options.shape:
        M, N, K = sizes(shape)
        second = weight(options, N, K) if gated else draw(options, N)
        inputs = (draw(options, M, K), weight(options, N, K), second, weight(options, K, N))
        contestants = {**ours(options, "linear_swiglu", call), "torch": plain_gated if gated else plain}
        contestants |= quack(options, gated)
        work = (6 if gated else 4) * M * N * K
        yield Case(shape, contestants, inputs, work, "FLOP", 2 * work)


def swiglu(options):
    for shape in options.shape:
        M, N, K = sizes(shape)
        inputs = (draw(options, M, K), weight(options, N, K), weight(options, N, K))
        contestants = {
            **ours(options, "linear_swiglu", lambda x, g, u, backend: mk.linear_swiglu(x, g, u, backend=backend)),
            "torch": lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u),
        }
        yield Case(shape, contestants, inputs, 4 * M * N * K, "FLOP", 8 * M * N * K)


def inner_gradient(options, gated: bool):
    """dz (M, N) from dy (M, K)."""

    def ours_(dy, w, pre, up, backend):
        found = activation_gradient(dy, w, pre, up if gated else None, "gelu_tanh", backend or "torch")
        return found if gated else found[0]

    def apart(dy, w, pre, up):
        dh = dy @ w
        if gated:
            return aten.silu_backward(dh * up, pre), dh * F.silu(pre)
        return aten.gelu_backward(dh, pre, approximate="tanh")

    for shape in options.shape:
        M, N, K = sizes(shape)
        inputs = [x.detach() for x in (draw(options, M, K), weight(options, K, N), *draw(options, 2, M, N))]
        yield Case(
            shape, {**ours(options, "linear_swiglu", ours_), "torch": apart}, inputs, 2 * M * N * K, "FLOP", None
        )


def parameters(options):
    """dW (N, K) and db (N,) from dz (M, N)."""
    dtype = options.torch_dtype
    for shape in options.shape:
        M, N, K = sizes(shape)
        inputs = [x.detach() for x in (draw(options, M, N), draw(options, M, K))]
        contestants = {
            **ours(options, "linear", lambda dz, x, backend: weight_gradient(dz, x, dtype, dtype, backend or "torch")),
            "torch": lambda dz, x: (dz.t() @ x, dz.sum(0)),
        }
        yield Case(shape, contestants, inputs, 2 * M * N * K, "FLOP", None)


def benchmark(options):
    run("mlp, gelu_tanh", options, two_layers(options, gated=False))
    run("mlp, swiglu", options, two_layers(options, gated=True))
    run("linear_swiglu", options, swiglu(options))
    if "forward" in options.passes:
        run("dz before gelu_tanh", options, inner_gradient(options, gated=False))
        run("dz before swiglu", options, inner_gradient(options, gated=True))
        run("dW, db", options, parameters(options))


if __name__ == "__main__":
    main("mlp", benchmark, SHAPES)
