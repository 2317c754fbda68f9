"""Attention in Triton, backward, in two passes that compute the probabilities again; no atomics, so it repeats exactly.

    delta[t] = sum_d dout[t, d] out[t, d]        p = exp(s - lse)         ds = p (keep dout v^T - delta)
    dq = scale ds k                              a program owns BM rows and walks the keys; it leaves delta
    dv = (p keep)^T dout    dk = scale ds^T q    a program owns BN keys and walks the rows of all query heads of a group

Seven products instead of the five of one pass with atomics. The second pass computes scores as (keys, rows): then p and
ds are first operands from registers, and never go through shared memory: on sm_90 all seven are wgmma. Writes every
output whole (=), sums in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakern.kernels.memory import empty_like
from megakern.kernels.triton import attention_tiles as tiles
from megakern.kernels.triton import tune
from megakern.kernels.triton.dropout import fold, keep
from megakern.kernels.triton.launch import launch

# --- kernels ---


@triton.jit
def _meet_rows(
    dk, dv, key, value, q, dout, log, delta, q_row, dout_row, low, count, turn, gap, cols, offset, T, S, left, right,
    scale, cap, slope, head_key, threshold, kept,
    MASK: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Keys `cols` (BN, 1) meet `count` blocks of rows of one query head from low on; those from number `turn` on lie
    `gap` further (see `edges`). With MASK rows from T on count nothing.
    """
    for step in range(0, count):
        start = low + step * BM
        if MASK:
            start += tl.where(step >= turn, gap, 0)
        rows = start + tl.arange(0, BM)
        query = tiles.tile(q, start, q_row, T, BM, D, BD, MASK)
        own = (rows + offset)[None, :]
        product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        product, bent = tiles.scores(product, own, cols, scale, cap, slope, CAPPED)
        if MASK:
            log_here = tl.load(log + rows, rows < T, tiles.INFINITY)
            delta_here = tl.load(delta + rows, rows < T, 0.0)
        else:
            log_here = tl.load(log + rows)
            delta_here = tl.load(delta + rows)
        p = tl.exp2(product - log_here[None, :])
        if MASK:
            p = tl.where(tiles.visible(own, cols, S, left, right, LEFT), p, 0.0)
        upstream = tiles.tile(dout, start, dout_row, T, BM, D, BD, MASK)
        dp = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
        used = p
        if DROPOUT:
            kept_here = keep(fold(head_key, rows)[None, :], cols, threshold)
            used = tl.where(kept_here, p, 0.0)
            dp = tl.where(kept_here, dp * kept, 0.0)
        dv = tl.dot(used.to(dout.dtype.element_ty), upstream, dv, input_precision=PRECISION)
        ds = p * (dp - delta_here[None, :])
        if CAPPED:
            ds *= 1.0 - bent * bent
        dk = tl.dot(ds.to(q.dtype.element_ty), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=tiles.CHANGING)
def _attention_key_value_gradient(
    q, k, v, dout, log, delta, dk, dv, q_offsets, k_offsets, slopes, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, dout_batch, dout_row, dout_head, dk_batch, dk_row, dk_head, log_batch, log_head,
    slope_batch, T, S, N, H, G, blocks, left, right, scale, cap, seed, first_sample, first_head, threshold, kept,
    factor,
    LEFT: tl.constexpr, CAPPED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program i: dk and dv of one block of keys of one key-value head, see `placed`; the last block comes first."""
    sample, kv_head, block = tiles.placed(tl.program_id(0), blocks, H // G)
    first, k_start, q_start = block * BN, 0, 0
    if k_offsets is not None:
        above = N
        while above - sample > 1:
            sample, above = tiles.narrowed(sample, above, tl.load(k_offsets + (sample + above) // 2), block, BN)
        k_start, q_start = tl.load(k_offsets + sample), tl.load(q_offsets + sample)
        S, T = tl.load(k_offsets + sample + 1) - k_start, tl.load(q_offsets + sample + 1) - q_start
        first = (block - k_start // BN - sample) * BN
    if first >= S:
        return
    batch, at = sample.to(tl.int64), kv_head.to(tl.int64)
    q_at, k_at = tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    key = tiles.tile(k + batch * k_batch + k_at * k_row + at * k_head, first, k_row, S, BN, D, BD, True)
    value = tiles.tile(v + batch * v_batch + k_at * v_row + at * v_head, first, v_row, S, BN, D, BD, True)
    cols = (first + tl.arange(0, BN))[:, None]
    dkey = tl.zeros((BN, BD), tl.float32)
    dvalue = tl.zeros((BN, BD), tl.float32)
    offset = S - T
    start, whole, ragged, stop = tiles.rows_seeing(
        first, tl.minimum(first + BN, S) - 1, offset, T, left, right, BM, LEFT
    )
    start, count, turn, gap = tiles.edges(start, whole, ragged, stop, BM)
    for member in range(0, G):
        head = kv_head * G + member
        at = head.to(tl.int64)
        q_here = q + batch * q_batch + q_at * q_row + at * q_head
        dout_here = dout + batch * dout_batch + q_at * dout_row + at * dout_head
        log_here = log + batch * log_batch + at * log_head + q_at
        delta_here = delta + batch * log_batch + at * log_head + q_at
        slope = None
        if slopes is not None:
            slope = tiles.slope_of(slopes, sample, head, slope_batch)
        head_key = tiles.head_key(seed, first_sample + sample, first_head + head)
        dkey, dvalue = _meet_rows(
            dkey, dvalue, key, value, q_here, dout_here, log_here, delta_here, q_row, dout_row, whole,
            (ragged - whole) // BM, 0, 0, cols, offset, T, S, left, right, scale, cap, slope, head_key, threshold, kept,
            False, LEFT, CAPPED, DROPOUT, PRECISION, D, BD, BM,
        )  # fmt: skip
        dkey, dvalue = _meet_rows(
            dkey, dvalue, key, value, q_here, dout_here, log_here, delta_here, q_row, dout_row, start, count, turn,
            gap, cols, offset, T, S, left, right, scale, cap, slope, head_key, threshold, kept,
            True, LEFT, CAPPED, DROPOUT, PRECISION, D, BD, BM,
        )  # fmt: skip
    to = batch * dk_batch + k_at * dk_row + kv_head.to(tl.int64) * dk_head
    tiles.put(dk + to, dkey * factor, first, dk_row, S, BN, D, BD)
    tiles.put(dv + to, dvalue * kept, first, dk_row, S, BN, D, BD)


@triton.jit
def _meet_keys(
    dq, query, upstream, log, delta, k, v, k_row, v_row, low, high, own, S, left, right, scale, cap, slope, keys,
    threshold, kept,
    MASK: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows meet keys low to high - 1."""
    for start in range(low, high, BN):
        cols = (start + tl.arange(0, BN))[None, :]
        key = tiles.tile(k, start, k_row, S, BN, D, BD, MASK)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        product, bent = tiles.scores(product, own, cols, scale, cap, slope, CAPPED)
        p = tl.exp2(product - log)
        if MASK:
            p = tl.where(tiles.visible(own, cols, S, left, right, LEFT), p, 0.0)
        value = tiles.tile(v, start, v_row, S, BN, D, BD, MASK)
        dp = tl.dot(upstream, tl.trans(value), input_precision=PRECISION)
        if keys is not None:
            dp = tl.where(keep(keys, cols, threshold), dp * kept, 0.0)
        ds = p * (dp - delta)
        if CAPPED:
            ds *= 1.0 - bent * bent
        dq = tl.dot(ds.to(k.dtype.element_ty), key, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=tiles.CHANGING)
def _attention_query_gradient(
    q, k, v, dout, out, lse, dq, log, delta, q_offsets, k_offsets, slopes, q_batch, q_row, q_head, k_batch, k_row,
    k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head, out_batch, out_row, out_head, dq_batch, dq_row,
    dq_head, log_batch, log_head, slope_batch, T, S, N, H, G, blocks, left, right, scale, cap, seed, first_sample,
    first_head, threshold, kept, factor,
    LEFT: tl.constexpr, CAPPED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program i: dq, delta and lse in powers of two of one block of rows of one query head, see `placed`."""
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
    upstream = tiles.tile(
        dout + batch * dout_batch + q_at * dout_row + at * dout_head, first, dout_row, T, BM, D, BD, True
    )
    result = tiles.tile(out + batch * out_batch + q_at * out_row + at * out_head, first, out_row, T, BM, D, BD, True)
    statistics = batch * log_batch + at * log_head + q_at + rows
    log_here = tl.load(lse + statistics, rows < T, tiles.INFINITY) * tiles.LOG2_E
    delta_here = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(log + statistics, log_here, rows < T)
    tl.store(delta + statistics, delta_here, rows < T)
    log_here, delta_here = log_here[:, None], delta_here[:, None]
    slope = None
    if slopes is not None:
        slope = tiles.slope_of(slopes, sample, head, slope_batch)
    keys = None
    if DROPOUT:
        keys = fold(tiles.head_key(seed, first_sample + sample, first_head + head), rows)[:, None]
    total = tl.zeros((BM, BD), tl.float32)
    start, whole, ragged, stop = tiles.keys_seen(
        first + S - T, tl.minimum(first + BM, T) - 1 + S - T, S, left, right, BN, LEFT
    )
    if LEFT:
        total = _meet_keys(
            total, query, upstream, log_here, delta_here, k, v, k_row, v_row, start, tl.minimum(whole, stop), own, S,
            left, right, scale, cap, slope, keys, threshold, kept, True, LEFT, CAPPED, PRECISION, D, BD, BN,
        )  # fmt: skip
    total = _meet_keys(
        total, query, upstream, log_here, delta_here, k, v, k_row, v_row, whole, ragged, own, S, left, right, scale,
        cap, slope, keys, threshold, kept, False, LEFT, CAPPED, PRECISION, D, BD, BN,
    )  # fmt: skip
    total = _meet_keys(
        total, query, upstream, log_here, delta_here, k, v, k_row, v_row, ragged, stop, own, S, left, right, scale, cap,
        slope, keys, threshold, kept, True, LEFT, CAPPED, PRECISION, D, BD, BN,
    )  # fmt: skip
    tiles.put(dq + batch * dq_batch + q_at * dq_row + at * dq_head, total * factor, first, dq_row, T, BM, D, BD)


# --- launchers ---


def query_gradient(call, dout, v, out, lse, dq):
    """Write dq -> what the other pass wants of each row: lse in powers of two, and delta, both fp32 like lse."""
    q, k = call.q, call.k
    log, delta = empty_like(lse), empty_like(lse)
    distances = (*tiles.strides(q, k, v, dout, out, dq), *tiles.lse_strides(lse), call.slope_batch)

    def run(config):
        blocks = call.blocks(q.shape[-3], config.tiles["BM"])
        launch(
            _attention_query_gradient, (blocks * q.shape[-2] * call.samples,), q, k, v, dout, out, lse, dq, log, delta,
            *call.tensors, *distances, *call.numbers(blocks), call.scale, config=config, **call.constants,
        )  # fmt: skip

    tune.run(call.choice("query gradient"), q, run)
    return log, delta


def key_value_gradient(call, dout, v, log, delta, dk, dv):
    """Write dk and dv."""
    q, k = call.q, call.k
    distances = (*tiles.strides(q, k, v, dout, dk), *tiles.lse_strides(log), call.slope_batch)

    def run(config):
        blocks = call.blocks(k.shape[-3], config.tiles["BN"])
        launch(
            _attention_key_value_gradient, (blocks * k.shape[-2] * call.samples,), q, k, v, dout, log, delta, dk, dv,
            *call.tensors, *distances, *call.numbers(blocks), call.scale, config=config, **call.constants,
        )  # fmt: skip

    tune.run(call.choice("key-value gradient"), q, run)
