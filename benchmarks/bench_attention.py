"""Attention beside PyTorch's scaled_dot_product_attention. FLOPs: 4 B H T^2 D, half if causal; backward 2.5 times.

On a GPU "torch sdpa" is FlashAttention 2, and "cuDNN" PyTorch's other implementation of the same function.
"""

from __future__ import annotations

from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes

# BxTxHxHkvxD, after a colon "full" where the attention is not causal.
SHAPES = {
    "cpu": ["12x256x6x6x64", "4x512x12x12x64", "1x1024x16x4x128"],
    "cuda": [
        "2x8192x64x8x128",
        "2x8192x64x8x128:full",
        "1x16384x64x8x128",
        "1x16384x32x32x64",
        "4x2048x32x8x128",
        "1x16384x32x32x64:full",
    ],
    "tiny": ["1x3x2x1x8", "1x3x2x1x8:full"],
}


def sdpa(q, k, v, causal: bool):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def by(implementation: SDPBackend, causal: bool):
    def call(q, k, v):
        with sdpa_kernel(implementation):
            return sdpa(q, k, v, causal)

    return call


def cases(options):
    for shape in options.shape:
        dims, _, kind = shape.partition(":")
        causal = kind != "full"
        B, T, H, kv_heads, D = sizes(dims)
        inputs = draw(options, B, T, H, D), draw(options, B, T, kv_heads, D), draw(options, B, T, kv_heads, D)
        work = (2.0 if causal else 4.0) * B * H * T * T * D
        call = lambda q, k, v, backend, causal=causal: mk.attention(q, k, v, causal=causal, backend=backend)  # noqa: E731
        peers = {"torch sdpa": lambda q, k, v, causal=causal: sdpa(q, k, v, causal)}
        if options.device.type == "cuda":
            peers = {
                "torch sdpa": by(SDPBackend.FLASH_ATTENTION, causal),
                "cuDNN": by(SDPBackend.CUDNN_ATTENTION, causal),
            }
        yield Case(shape, {**ours(options, "attention", call), **peers}, inputs, work, "FLOP", 2.5 * work)


def benchmark(options):
    run("attention, causal, BxTxHxHkvxD", options, cases(options))


if __name__ == "__main__":
    main("attention", benchmark, SHAPES)
