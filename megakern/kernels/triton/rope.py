"""Rotary position embedding in Triton: one program a token rotates all its query and key heads; writes = .

The token's cosines and sines are read once. Arithmetic is fp32, rounded once. A position outside the tables gives NaN.
In place, all threads have read a tile before one writes to it: several may hold copies of one element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakern.kernels.memory import empty_like, write_back
from megakern.kernels.triton import configs
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _rotate(
    x, out, H, D, d, head_stride, out_stride, cos, sin,
    INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All H heads of one token: x at stride head_stride, out at out_stride or in place x; cos, sin (1, HALF)."""
    pair = tl.arange(0, HALF)[None, :]
    for start in range(0, H, HEADS):
        heads = start + tl.arange(0, HEADS)[:, None]
        if INTERLEAVED:
            both = tl.arange(0, 2 * HALF)[None, :]
            mask = (heads < H) & (both < 2 * d)
            values = tl.load(x + heads * head_stride + both, mask, 0.0).to(tl.float32)
            if IN_PLACE:
                tl.debug_barrier()
            first, second = tl.split(tl.reshape(values, (HEADS, HALF, 2)))
            values = tl.interleave(first * cos - second * sin, second * cos + first * sin)
            tl.store(out + heads * out_stride + both, values.to(out.dtype.element_ty), mask)
        else:
            mask = (heads < H) & (pair < d)
            first = tl.load(x + heads * head_stride + pair, mask, 0.0).to(tl.float32)
            second = tl.load(x + heads * head_stride + d + pair, mask, 0.0).to(tl.float32)
            if IN_PLACE:
                tl.debug_barrier()
            tl.store(out + heads * out_stride + pair, (first * cos - second * sin).to(out.dtype.element_ty), mask)
            tl.store(out + heads * out_stride + d + pair, (second * cos + first * sin).to(out.dtype.element_ty), mask)
        if REST > 0 and not IN_PLACE:
            rest = 2 * d + tl.arange(0, REST)[None, :]
            mask = (heads < H) & (rest < D)
            tl.store(out + heads * out_stride + rest, tl.load(x + heads * head_stride + rest, mask, 0.0), mask)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin, positions, T, H, Hkv, D, d, Tmax,
    q_batch, q_token, q_head, k_batch, k_token, k_head, cos_stride, sin_stride, position_batch, position_token,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
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
    q += b * q_batch + t * q_token
    k += b * k_batch + t * k_token
    if IN_PLACE:
        _rotate(q, q, H, D, d, q_head, q_head, c, s, INTERLEAVED, IN_PLACE, HEADS, HALF, REST)
        _rotate(k, k, Hkv, D, d, k_head, k_head, c, s, INTERLEAVED, IN_PLACE, HEADS, HALF, REST)
    else:
        _rotate(q, q_out + token * H * D, H, D, d, q_head, D, c, s, INTERLEAVED, IN_PLACE, HEADS, HALF, REST)
        _rotate(k, k_out + token * Hkv * D, Hkv, D, d, k_head, D, c, s, INTERLEAVED, IN_PLACE, HEADS, HALF, REST)


# --- launchers ---


def rope(q, k, cos, sin, positions, interleaved, inverse, in_place=False):
    """-> rotated q, k: new and contiguous, or in place. The arithmetic is fp32, rounded once to the dtype of q."""
    given = q, k
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = (q, k) if in_place else (empty_like(q), empty_like(k))
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
    options = {"INTERLEAVED": interleaved, "INVERSE": inverse, "IN_PLACE": in_place}
    launch(_rope, (B * T,), *tensors, *sizes, *strides, config=config, **options)
    return write_back((q_out, k_out), given) if in_place else (q_out, k_out)
