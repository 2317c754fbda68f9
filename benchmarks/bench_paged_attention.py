"""Decoding over paged keys and values: bytes of keys and values, once. Peers: attention over dense ones, flash-attn.

"torch sdpa" reads the same number of keys from one dense tensor, as PyTorch has no paged attention of its own.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

PAGE = 256
# BxSxHxHkvxD: B sequences of S keys, one new token each.
SHAPES = {
    "cpu": ["4x1024x16x4x128"],
    "cuda": ["32x8192x64x8x128", "128x8192x64x8x128", "1x32768x32x8x128", "8x4096x32x32x64"],
    "tiny": ["2x300x2x1x8"],
}


def flash(module, q, k_cache, v_cache, table, lengths):
    """Its pages hold a multiple of 256 keys."""
    return module.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True)


def cases(options):
    for shape in options.shape:
        B, S, H, kv_heads, D = sizes(shape)
        pages = -(-S // PAGE)
        q = draw(options, B, 1, H, D).detach()
        cache = [draw(options, B * pages, PAGE, kv_heads, D).detach() for _ in range(2)]
        table = torch.randperm(B * pages, device=options.device).view(B, pages).int()
        lengths = torch.full((B,), S, dtype=torch.int32, device=options.device)
        dense = [x[table.long()].flatten(1, 2)[:, :S].transpose(1, 2).contiguous() for x in cache]

        def sdpa(q, *rest, dense=dense, grouped=kv_heads != H):
            return F.scaled_dot_product_attention(q.transpose(1, 2), *dense, enable_gqa=grouped).transpose(1, 2)

        contestants = {
            **ours(options, "paged_attention", mk.paged_attention),
            "torch sdpa": sdpa,
            **peer(options, "flash-attn", "flash_attn", flash),
        }
        bytes_read = 2.0 * B * S * kv_heads * D * q.element_size()
        yield Case(shape, contestants, (q, *cache, table, lengths), bytes_read, "B", None)


def benchmark(options):
    run("paged attention, BxSxHxHkvxD", options, cases(options))


if __name__ == "__main__":
    main("paged_attention", benchmark, SHAPES)
