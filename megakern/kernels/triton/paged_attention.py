"""Attention over pages of keys and values in Triton: the kernels of attention_decode.py."""

from __future__ import annotations

from megakern.kernels.triton.attention_decode import decode


def paged_attention(q, k_cache, v_cache, block_table, lengths, slopes, window, scale, softcap):
    """-> out like q, lse (B, H, T) in fp32."""
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    return decode(q, k_cache, v_cache, table, lengths.contiguous(), slopes, window, scale, softcap)
