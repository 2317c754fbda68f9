"""Attention over pages of keys and values: the kernels of csrc/attention_decode.cu."""

from __future__ import annotations

from megakern.kernels.cuda.attention_decode import decode


def paged_attention(q, k_cache, v_cache, block_table, lengths, slopes, window, scale, softcap):
    """-> out like q, lse (B, H, T) in fp32."""
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    return decode(q, k_cache, v_cache, table, lengths.contiguous(), slopes, window, scale, softcap)
