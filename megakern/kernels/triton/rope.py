"""Rotary position embedding in Triton: one program a token rotates all its query and key heads; writes = .

The token's cosines and sines are read once. Arithmetic is fp32, rounded once. A position outside the tables gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakern.kernels.memory import empty_like
from megakern.kernels.triton import configs
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _rotate(
    x, out, H, D, d, head_stride, cos, sin,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All H heads of one token: x at stride head_stride, out contiguous (H, D); cos, sin (1, HALF)."""
    pair = tl.arange(0, HALF)[None, :]
    for start in range(0, H, HEADS):
        heads = start + tl.arange(0, HEADS)[:, None]
        if INTERLEAVED:
            both = tl.arange(0, 2 * HALF)[None, :]
            mask = (heads < H) & (both < 2 * d)
            values = tl.load(x + heads * head_stride + both, mask, 0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(values, (HEADS, HALF, 2)))
            values = tl.interleave(first * cos - second * sin, second * cos + first * sin)
            tl.store(out + heads * D + both, values.to(out.dtype.element_ty), mask)
        else:
            mask = (heads < H) & (pair < d)
            first = tl.load(x + heads * head_stride + pair, mask, 0.0).to(tl.float32)
            second = tl.load(x + heads * head_stride + d + pair, mask, 0.0).to(tl.float32)
            tl.store(out + heads * D + pair, (first * cos - second * sin).to(out.dtype.element_ty), mask)
            tl.store(out + heads * D + d + pair, (second * cos + first * sin).to(out.dtype.element_ty), mask)
        if REST > 0:
            rest = 2 * d + tl.arange(0, REST)[None, :]
            mask = (heads < H) & (rest < D)
            tl.store(out + heads * D + rest, tl.load(x + heads * head_stride + rest, mask, 0.0), mask)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin, positions, T, H, Hkv, D, d, Tmax,
    q_batch, q_token, q_head, k_batch, k_token, k_head, cos_stride, sin_stride, position_batch, position_token,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program i: token i of B T."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    row = t
    if positions is not None:
        row = tl.load(positions + b * position_batch + t * position_token).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    known = (pair < d) & (row >= 0) & (row < Tmax)
    c = tl.load(cos + row * cos_stride + pair, known, float("nan")).to(tl.float32)
    s = tl.load(sin + row * sin_stride + pair, known, float("nan")).to(tl.float32)
    if INVERSE:
        s = -s
    _rotate(q + b * q_batch + t * q_token, q_out + token * H * D, H, D, d, q_head, c, s, INTERLEAVED, HEADS, HALF, REST)
    _rotate(
        k + b * k_batch + t * k_token, k_out + token * Hkv * D, Hkv, D, d, k_head, c, s, INTERLEAVED, HEADS, HALF, REST
    )


# --- launchers ---


def rope(q, k, cos, sin, positions, interleaved, inverse):
    """-> rotated q, k, contiguous. The arithmetic is fp32, rounded once to the dtype of q."""
    q_out, k_out = empty_like(q), empty_like(k)
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    B, T, H, D = q.shape
    Hkv, (Tmax, d) = k.shape[2], cos.shape
    position_strides = (0, 0)
    if positions is not None:
        positions = positions.expand(B, T)
        position_strides = positions.stride()
    strides = (*q.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0), *position_strides)
    sizes = (T, H, Hkv, D, d, Tmax)
    config = configs.rope(H, D, d)
    tensors = (q, k, q_out, k_out, cos, sin, positions)
    launch(_rope, (B * T,), *tensors, *sizes, *strides, config=config, INTERLEAVED=interleaved, INVERSE=inverse)
    return q_out, k_out
