"""Causal attention beside PyTorch's scaled_dot_product_attention. FLOPs: 2 B H T^2 D; backward 2.5 times that."""

from __future__ import annotations

from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, options_for, run, sizes


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def cases(options):
    for shape in options.shape:
        B, T, H, kv_heads, D = sizes(shape)
        inputs = draw(options, B, T, H, D), draw(options, B, T, kv_heads, D), draw(options, B, T, kv_heads, D)
        work = 2.0 * B * H * T * T * D
        contestants = {"megakern": lambda q, k, v: mk.attention(q, k, v, backend=options.backend), "torch sdpa": sdpa}
        yield Case(shape, contestants, inputs, work, "FLOP", 2.5 * work)


if __name__ == "__main__":
    options = options_for("attention", ["12x256x6x6x64", "4x512x12x12x64", "1x1024x16x4x128"])
    run("attention, causal, BxTxHxHkvxD", options, cases(options))
