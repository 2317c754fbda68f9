"""Attention beside PyTorch's implementations, FlexAttention and flash-attn. FLOPs: 4 B H T^2 D, half if causal;
backward 2.5 times.

On a GPU "torch sdpa" is PyTorch's FlashAttention 2, "cuDNN" and "efficient" its other implementations of that function.
FlexAttention is compiled, with a block mask made beforehand: on a GPU only, as on CPUs it has no backward pass.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

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


def efficient(q, k, v, causal: bool):
    """The memory-efficient implementation has no grouped heads: keys and values are repeated, inside the time."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    return by(SDPBackend.EFFICIENT_ATTENTION, causal)(q, k, v)


def flex(T: int, causal: bool, device):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device) if causal else None
    compiled = torch.compile(functools.partial(flex_attention, block_mask=mask), dynamic=False)

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

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
                "efficient": functools.partial(efficient, causal=causal),
            }
            if options.compile:
                torch._functorch.config.donated_buffer = False  # else a backward pass runs only once
                peers["FlexAttention"] = flex(T, causal, options.device)
        call_flash = lambda m, q, k, v, causal=causal: m.flash_attn_func(q, k, v, causal=causal)  # noqa: E731
        peers |= peer(options, "flash-attn", "flash_attn", call_flash)
        yield Case(shape, {**ours(options, "attention", call), **peers}, inputs, work, "FLOP", 2.5 * work)


def benchmark(options):
    run("attention, causal, BxTxHxHkvxD", options, cases(options))


if __name__ == "__main__":
    main("attention", benchmark, SHAPES)
