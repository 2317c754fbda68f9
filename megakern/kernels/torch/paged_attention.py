"""Paged attention for any device: each sequence's pages become dense keys, then it is one call of attention.

Pages that follow one another, as those of a lone sequence do, are read where they lie; others are gathered.
"""

from __future__ import annotations

import torch

from megakern.kernels.torch.attention import attention_forward


def paged_attention(q, k_cache, v_cache, block_table, lengths, slopes, window, scale, softcap):
    """-> out like q, lse (B, H, T) in fp32 (fp64 for fp64)."""
    B, T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    page_size, rows = k_cache.shape[1], block_table.tolist()
    for b, length in enumerate(lengths.tolist()):
        pages = rows[b][: -(-length // page_size)]
        keys, values = (_dense(cache, pages)[None, :length] for cache in (k_cache, v_cache))
        own_slopes = slopes if slopes is None or slopes.ndim == 1 else slopes[b]
        how = (None, None, own_slopes, window, scale, softcap, 0.0, (0, 0, 0), True)
        out[b : b + 1], lse[b : b + 1] = attention_forward(q[b : b + 1], keys, values, *how)
    return out, lse


def _dense(cache: torch.Tensor, pages: list[int]) -> torch.Tensor:
    """(pages, page_size, G, D) -> (S, G, D) of the named pages, a view where they follow one another."""
    first = pages[0] if pages else 0
    if pages == list(range(first, first + len(pages))):
        return cache[first : first + len(pages)].flatten(0, 1)
    return cache[torch.tensor(pages, device=cache.device)].flatten(0, 1)
