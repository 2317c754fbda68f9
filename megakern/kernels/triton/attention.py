"""Attention in Triton (flash attention, arXiv 2205.14135, 2307.08691): the forward kernel, and the launchers.

Each program makes the output of BM rows of one query head: it walks the keys in blocks of BN with a running maximum and
sum of each row, and never holds more than one block of scores. Blocks that every row sees whole skip the mask. Writes
out and lse whole (=). Operands have the dtype of q, sums are fp32; fp32 operands are multiplied in full precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakern.kernels.memory import empty, empty_like
from megakern.kernels.triton import attention_backward as backward
from megakern.kernels.triton import attention_configs as configs
from megakern.kernels.triton import attention_tiles as tiles
from megakern.kernels.triton import tune
from megakern.kernels.triton.attention_decode import decode
from megakern.kernels.triton.dropout import fold, keep
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _meet(
    total, highest, sum, q, k, v, k_row, v_row, low, high, own, S, left, right, scale, cap, slope, keys, threshold,
    MASK: tl.constexpr, LEFT: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows q meet keys low to high - 1. PLAIN: scale is positive and all that happens to a product."""
    for start in range(low, high, BN):
        cols = (start + tl.arange(0, BN))[None, :]
        key = tiles.tile(k, start, k_row, S, BN, D, BD, MASK)
        product = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if PLAIN:
            if MASK:
                product = tl.where(tiles.visible(own, cols, S, left, right, LEFT), product, -tiles.INFINITY)
            new = tl.maximum(highest, tl.max(product, 1) * scale)
        else:
            product, _ = tiles.scores(product, own, cols, scale, cap, slope, CAPPED)
            if MASK:
                product = tl.where(tiles.visible(own, cols, S, left, right, LEFT), product, -tiles.INFINITY)
            new = tl.maximum(highest, tl.max(product, 1))
        base = new
        if MASK:  # rows that have seen nothing yet
            base = tl.where(new == -tiles.INFINITY, 0.0, new)
        if PLAIN:
            p = tl.exp2(product * scale - base[:, None])
        else:
            p = tl.exp2(product - base[:, None])
        shrink = tl.exp2(highest - base)
        sum = sum * shrink + tl.sum(p, 1)
        highest = new
        if keys is not None:
            p = tl.where(keep(keys, cols, threshold), p, 0.0)
        value = tiles.tile(v, start, v_row, S, BN, D, BD, MASK)
        total = tl.dot(p.to(v.dtype.element_ty), value, total * shrink[:, None], input_precision=PRECISION)
    return total, highest, sum


@triton.jit(do_not_specialize=tiles.CHANGING)
def _attention_forward(
    q, k, v, out, lse, q_offsets, k_offsets, slopes, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row,
    v_head, out_batch, out_row, out_head, lse_batch, lse_head, slope_batch, T, S, N, H, G, blocks, left, right, scale,
    cap, seed, first_sample, first_head, threshold, kept,
    LEFT: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program i: one block of rows of one query head, see `placed`."""
    sample, head, block = tiles.placed(tl.program_id(0), blocks, H)
    first, q_start, k_start = block * BM, 0, 0
    if q_offsets is not None:
        above = N
        while above - sample > 1:
            sample, above = tiles.narrowed(sample, above, tl.load(q_offsets + (sample + above) // 2), block, BM)
        q_start, k_start = tl.load(q_offsets + sample), tl.load(k_offsets + sample)
        T, S = tl.load(q_offsets + sample + 1) - q_start, tl.load(k_offsets + sample + 1) - k_start
        first = (block - q_start // BM - sample) * BM
    if first >= T:
        return
    batch, at = sample.to(tl.int64), head.to(tl.int64)
    q_at, k_at = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    k += batch * k_batch + k_at * k_row + at // G * k_head
    v += batch * v_batch + k_at * v_row + at // G * v_head
    rows = first + tl.arange(0, BM)
    own = (rows + S - T)[:, None]
    query = tiles.tile(q + batch * q_batch + q_at * q_row + at * q_head, first, q_row, T, BM, D, BD, True)
    slope = None
    if slopes is not None:
        slope = tiles.slope_of(slopes, sample, head, slope_batch)
    keys = None
    if DROPOUT:
        keys = fold(tiles.head_key(seed, first_sample + sample, first_head + head), rows)[:, None]
    total = tl.zeros((BM, BD), tl.float32)
    highest = tl.full((BM,), -tiles.INFINITY, tl.float32)
    sum = tl.zeros((BM,), tl.float32)
    start, whole, ragged, stop = tiles.keys_seen(
        first + S - T, tl.minimum(first + BM, T) - 1 + S - T, S, left, right, BN, LEFT
    )
    if LEFT:
        total, highest, sum = _meet(
            total, highest, sum, query, k, v, k_row, v_row, start, tl.minimum(whole, stop), own, S, left, right, scale,
            cap, slope, keys, threshold, True, LEFT, PLAIN, CAPPED, PRECISION, D, BD, BN,
        )  # fmt: skip
    total, highest, sum = _meet(
        total, highest, sum, query, k, v, k_row, v_row, whole, ragged, own, S, left, right, scale, cap, slope, keys,
        threshold, False, LEFT, PLAIN, CAPPED, PRECISION, D, BD, BN,
    )  # fmt: skip
    total, highest, sum = _meet(
        total, highest, sum, query, k, v, k_row, v_row, ragged, stop, own, S, left, right, scale, cap, slope, keys,
        threshold, True, LEFT, PLAIN, CAPPED, PRECISION, D, BD, BN,
    )  # fmt: skip
    blind = sum == 0.0
    total *= (kept / tl.where(blind, 1.0, sum))[:, None]
    tiles.put(out + batch * out_batch + q_at * out_row + at * out_head, total, first, out_row, T, BM, D, BD)
    log = tl.where(blind, -tiles.INFINITY, (highest + tl.log2(sum)) * tiles.LN_2)
    tl.store(lse + batch * lse_batch + at * lse_head + q_at + rows, log, rows < T)


# --- launchers ---


def attention_forward(
    q, k, v, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key, deterministic
):
    """-> out like q, lse (B, H, T), packed (H, T), in fp32."""
    if configs.decodes(q.shape[-3], q.shape[-2] // k.shape[-2], q_offsets is not None, dropout_p > 0):
        return decode(q, k, v, None, None, slopes, window, scale, softcap)
    out = empty_like(q)
    lse = empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.float32, q.device)
    q, k, v = tiles.by_rows(q, k, v)
    call = tiles.Call(q, k, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key)
    distances = (*tiles.strides(q, k, v, out), *tiles.lse_strides(lse), call.slope_batch)
    plain = scale > 0 and not softcap and call.slopes is None

    def run(config):
        blocks = call.blocks(q.shape[-3], config.tiles["BM"])
        launch(
            _attention_forward, (blocks * q.shape[-2] * call.samples,), q, k, v, out, lse, *call.tensors, *distances,
            *call.numbers(blocks), config=config, PLAIN=plain, **call.constants,
        )  # fmt: skip

    tune.run(call.choice("forward"), q, run)
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key,
    deterministic, sunk=False,
):  # fmt: skip
    """-> contiguous dq, dk, dv like q, k, v. Nothing is added by several programs, so it always repeats to the bit.

    sunk: more than the scores of keys is in lse, from which probabilities are computed in any case.
    """
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    if q.shape[-2] == 0:
        return dq, dk.zero_(), dv.zero_()
    dout, q, k, v, out = tiles.by_rows(dout, q, k, v, out)
    call = tiles.Call(q, k, q_offsets, k_offsets, slopes, window, scale, softcap, dropout_p, dropout_key)
    log, delta = backward.query_gradient(call, dout, v, out, lse.contiguous(), dq)
    backward.key_value_gradient(call, dout, v, log, delta, dk, dv)
    return dq, dk, dv
