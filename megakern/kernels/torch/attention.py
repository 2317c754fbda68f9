"""Attention for any device, tuned for CPUs: our C++ kernel, torch's fused kernel where it fits, tiles. Deterministic.

The C++ kernel (csrc/cpu/attention*) takes fp32 and bf16 with any mask, dropout and grouped heads, but no score cap and
no few rows (decoding). On one Zen 4 core, (12, 256, 6, 64), forward | backward, CPU ms: bf16 6.2 | 13, fp32 11 | 24.

Between the other two, the choice, by ms of forward | backward on one AVX-512 core without AMX (Xeon, torch 2.13), 2048
tokens, causal, D = 64, 6 heads (12 from T = 512 on). "as fp32": half-precision input widened first, as such cores
multiply fp32 faster.

                    T = 16        64            128           256           512           1024
    fp32  tiles     5.4 | 9.9     7.3 | 13      10  | 19      13  | 26      35 | 76       59 | 126
          fused     2.2 | 5.1     3.8 | 8.2     5.7 | 13      9.1 | 19      33 | 79       48 | 113
    bf16  tiles     4.9 | 9.7     7.2 | 12      9.4 | 19      13  | 25      32 | 66       52 | 111
          fused     2.1 | 62      4.4 | 39      7.4 | 49      13  | 48      50 | 152      71 | 194
          as fp32   3.1 | 9.4     5.3 | 12      7.5 | 16      11  | 23      36 | 82       48 | 117

Without a mask the fused kernel is 1.4 to 2 times faster than tiles at each T. Grouped heads change little. With D = 128
its backward pass is slower (T = 512, 8 heads: 58 against 47). Processors with fast bf16 matmuls take bf16 tiles: on a
Zen 5, forward + backward of (12, 256, 6, 64), two cores: tiles 14 ms, fused 29.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from megakern.kernels.torch import attention_tiles as tiles
from megakern.kernels.torch import dropout, native

aten = torch.ops.aten

WIDEN_ROWS = 128  # half-precision input is widened for the fused forward from this many query rows on
FAST_BF16_ROWS = 64  # bf16 tiles instead of the fused forward from this many query rows on, if bf16 matmuls are fast


def attention_forward(
    q, k, v, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> out like q, lse (B, H, T), packed (H, T), in fp32 (fp64 for fp64)."""
    rules = tiles.Rules.of(window, scale, softcap, dropout_p, dropout_key, slopes)
    if q_offsets is None:
        return _forward(q, k, v, rules, 0)
    outs, lses = [q[:0]], [torch.empty(q.shape[1], 0, dtype=_lse_dtype(q), device=q.device)]
    for i, queries, keys in _sequences(q_offsets, k_offsets):
        out, lse = _forward(q[None, queries], k[None, keys], v[None, keys], rules.of_sequence(i), i)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def attention_backward(
    dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key,
    deterministic, sunk=False,
):  # fmt: skip
    """-> contiguous dq, dk, dv like q, k, v. sunk: more than the scores of keys is in lse."""
    rules = tiles.Rules.of(window, scale, softcap, dropout_p, dropout_key, slopes)
    if q_offsets is None:
        return _backward(dout, q, k, v, out, lse, rules, 0, sunk)
    gradients = [(q[:0], k[:0], v[:0])]
    for i, queries, keys in _sequences(q_offsets, k_offsets):
        inputs = dout[None, queries], q[None, queries], k[None, keys], v[None, keys]
        results = out[None, queries], lse[None, :, queries]
        gradients.append([x[0] for x in _backward(*inputs, *results, rules.of_sequence(i), i, sunk)])
    return tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))


def attention_qkv_backward(dout, qkv, out, lse, window, scale, softcap, dropout_p, dropout_key, deterministic):
    """-> contiguous dqkv like qkv (B, T, H, 3, D), [q, k, v] of each head; out and lse are those of the three."""
    rules = tiles.Rules.of(window, scale, softcap, dropout_p, dropout_key, None)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward(dout, *qkv.unbind(3), out, lse, rules, 0, into=dqkv.unbind(3))
    return dqkv


def _sequences(q_offsets, k_offsets):
    """(index, rows of q, rows of k) of each packed sequence that has any."""
    q_ends, k_ends = q_offsets.tolist(), k_offsets.tolist()
    found = [(i, slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])) for i in range(len(q_ends) - 1)]
    return [(i, q, k) for i, q, k in found if q.start < q.stop or k.start < k.stop]


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q, k, v, rules, sample):
    T, dtype = q.shape[1], product_dtype(q.dtype)
    if rules.slopes is None and native.takes_attention(q, k, v, dtype, rules.softcap):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[0], q.shape[2], T, dtype=torch.float32)
        native.attention_forward(q, k, v, out, lse, dtype, *_native_options(rules, sample))
        return out, lse
    fused = _fused(q, k, rules)
    if fused is None or (dtype == torch.bfloat16 and T >= FAST_BF16_ROWS):
        return tiles.forward(q, k, v, rules, sample, dtype)
    keys, causal = fused
    used = dtype if T >= WIDEN_ROWS else q.dtype
    q_heads, *kv_heads = (_by_head(x, used) for x in (q, k[:, keys], v[:, keys]))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_heads, *kv_heads, 0.0, causal, scale=rules.scale)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()


def _backward(dout, q, k, v, out, lse, rules, sample, sunk=False, into=None):
    """-> dq, dk, dv: contiguous ones, or `into`, filled, whose last strides are 1."""
    dtype = product_dtype(q.dtype)
    if rules.slopes is None and native.takes_attention(q, k, v, dtype, rules.softcap):
        gradients = into or [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        native.attention_backward(dout, q, k, v, out, lse, *gradients, dtype, *_native_options(rules, sample))
        return tuple(gradients)
    gradients = _composite_backward(dout, q, k, v, out, lse, rules, sample, sunk, dtype)
    if into is None:
        return gradients
    for place, gradient in zip(into, gradients, strict=True):
        place.copy_(gradient)
    return into


def _composite_backward(dout, q, k, v, out, lse, rules, sample, sunk, dtype):
    fused = _fused(q, k, rules)
    if fused is None or dtype == torch.bfloat16 or q.shape[1] == 1:  # one row may see some of the keys only
        return tiles.backward(dout, q, k, v, lse if sunk else None, rules, sample, dtype)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_head(x, dtype) for x in (dout, q, k, v, out)), lse, 0.0, fused[1], scale=rules.scale
    )
    return tuple(x.transpose(1, 2).to(q.dtype).contiguous() for x in gradients)


def _native_options(rules, sample):
    window = tuple(-1 if side is None else side for side in (rules.left, rules.right))
    threshold = dropout.threshold(rules.dropout_p)
    first_sample = rules.first_sample + sample
    return window, rules.scale, rules.dropout_p, threshold, rules.seed, first_sample, rules.first_head


def _fused(q, k, rules):
    """(keys, causal) for the fused kernel, or None where it does not fit. It aligns a causal mask to the top left."""
    T, S = q.shape[1], k.shape[1]
    if q.device.type != "cpu" or rules.softcap or rules.slopes is not None or rules.dropout_p or 0 in (*q.shape, S):
        return None
    if rules.scale <= 0:  # it masks before it scales, so -inf becomes inf
        return None
    if T == 1:  # one row sees one range of keys
        return slice(*rules.visible(0, 1, S - 1, S)), False
    if rules.left is not None and rules.left < S - 1:
        return None
    if rules.right is None or rules.right >= T - 1:
        return slice(0, S), False
    return (slice(0, S), True) if rules.right == 0 and T == S else None


def _by_head(x, dtype):
    """(B, H, T, D) of `dtype`. The fused kernel takes the last stride to be 1 without a check."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: fp32, but bf16 for bf16 input where that is clearly faster.

    A matter of the processor and not of a measurement, so that a machine always gives the same bits.
    """
    if dtype == torch.float64 or (dtype == torch.bfloat16 and _fast_bf16()):
        return dtype
    return torch.float32


def _fast_bf16() -> bool:
    """AMX, or AVX512-BF16 of AMD (3.5 x fp32 on Zen 5). Intel's AVX512-BF16 without AMX runs at 0.6 x fp32."""
    if torch.cpu._is_amx_tile_supported():
        return True
    processors = Path("/proc/cpuinfo")
    is_amd = processors.exists() and "AuthenticAMD" in processors.read_text()
    return is_amd and torch.cpu._is_avx512_bf16_supported()
