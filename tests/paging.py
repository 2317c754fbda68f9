"""Dense keys and values laid out in pages, for tests of paged attention: unused rows and pages are NaN."""

from __future__ import annotations

import torch


def paged(k, v, lengths: list[int], page_size: int, spare: int = 1):
    """k, v (B, S, Hkv, D) -> k_cache, v_cache, block_table, lengths. Pages lie in random order; entries of the table
    behind a sequence's last page name no page."""
    B, S, Hkv, D = k.shape
    P = -(-S // page_size) + spare
    order = torch.randperm(B * P + 2, generator=torch.Generator().manual_seed(5))[: B * P].view(B, P)
    caches = [torch.full((B * P + 2, page_size, Hkv, D), float("nan"), dtype=x.dtype) for x in (k, v)]
    table = torch.full((B, P), -7, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for first in range(0, length, page_size):
            page, last = order[b, first // page_size], min(length, first + page_size)
            table[b, first // page_size] = page
            for cache, x in zip(caches, (k, v), strict=True):
                cache[page, : last - first] = x[b, first:last].cpu()
    found = (*caches, table, torch.tensor(lengths, dtype=torch.int32))
    return tuple(x.to(k.device) for x in found)


def dense(attention, q, k, v, lengths: list[int], **options):
    """(out, lse) of one call of `attention` for each sequence, over its own keys."""
    slopes = options.pop("alibi_slopes", None)
    parts = [
        attention(
            q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], return_lse=True, **options,
            alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b],
        )
        for b, length in enumerate(lengths)
    ]  # fmt: skip
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))
