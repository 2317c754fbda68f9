"""Attention of few queries against many keys in Triton: the keys are split over programs, a second kernel combines.

A program takes all query heads of a group and all T new queries as the rows of its products, so every key is read once,
and walks one of `splits` equal pieces of the keys. Keys and values lie in one tensor, or in pages named by a table.
Each piece leaves its own out and lse; together they are out = sum_i exp(lse_i - lse) out_i. Writes outputs whole (=).
Bound by the reading of keys and values, so on sm_90 too the products of fewer than 64 rows are HMMA, not HGMMA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakern.kernels.memory import empty, empty_like
from megakern.kernels.triton import attention_configs as configs
from megakern.kernels.triton import attention_tiles as tiles
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.tile_config import cdiv

# --- kernels ---


@triton.jit
def _keys(
    x, table, start, page_stride, stride, limit, PAGE: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Keys start to start + BN - 1 of a tensor, or of pages of PAGE keys, as (BN, BD); 0 past D, and past `limit`."""
    if table is None:
        return tiles.tile(x, start, stride, limit, BN, D, BD, CHECK)
    elif PAGE % BN == 0:  # a block lies in one page
        page = tl.load(table + start // PAGE).to(tl.int64)
        first = start % PAGE
        return tiles.tile(x + page * page_stride, first, stride, limit - start + first, BN, D, BD, CHECK)
    else:
        cols = start + tl.arange(0, BN)
        col = tl.arange(0, BD)
        inside = cols < limit
        page = tl.load(table + cols // PAGE, inside, 0).to(tl.int64)
        where = x + (page * page_stride + (cols % PAGE) * stride)[:, None] + col[None, :]
        return tl.load(where, inside[:, None] & (col < D)[None, :], 0.0)


@triton.jit
def _meet(
    total, highest, sum, q, k, v, table, k_page, k_row, v_page, v_row, low, high, own, S, left, right, scale, cap,
    slope,
    MASK: tl.constexpr, LEFT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows q meet keys low to high - 1."""
    for start in range(low, high, BN):
        cols = (start + tl.arange(0, BN))[None, :]
        key = _keys(k, table, start, k_page, k_row, S, PAGE, BN, D, BD, MASK)
        product = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        product, _ = tiles.scores(product, own, cols, scale, cap, slope, CAPPED)
        if MASK:
            product = tl.where(tiles.visible(own, cols, S, left, right, LEFT), product, -tiles.INFINITY)
        new = tl.maximum(highest, tl.max(product, 1))
        base = tl.where(new == -tiles.INFINITY, 0.0, new)
        p = tl.exp2(product - base[:, None])
        shrink = tl.exp2(highest - base)
        sum = sum * shrink + tl.sum(p, 1)
        highest = new
        value = _keys(v, table, start, v_page, v_row, S, PAGE, BN, D, BD, MASK)
        total = tl.dot(p.to(v.dtype.element_ty), value, total * shrink[:, None], input_precision=PRECISION)
    return total, highest, sum


@triton.jit(do_not_specialize=["T", "S", "H", "G", "blocks", "splits", "left", "right"])
def _attention_decode(
    q, k, v, out, lse, table, lengths, slopes, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, lse_batch, lse_head, table_batch, slope_batch, out_split, lse_split, T, S, H, G,
    blocks, splits, left, right, scale, cap,
    LEFT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program i: a piece of the keys (fastest), a block of the rows of a group, a key-value head, a sample."""
    program = tl.program_id(0)
    split = program % splits
    first = program // splits % blocks * BM
    kv_head = program // (splits * blocks) % (H // G)
    sample = program // (splits * blocks) // (H // G)
    if lengths is not None:
        S = tl.load(lengths + sample)
    row = first + tl.arange(0, BM)  # query row // G of head row % G of the group
    rows = row // G
    heads = (kv_head * G + row % G).to(tl.int64)
    own = (rows + S - T)[:, None]
    inside = row < T * G
    col = tl.arange(0, BD)
    batch, at = sample.to(tl.int64), kv_head.to(tl.int64)
    where = q + batch * q_batch + (rows * q_row + heads * q_head)[:, None] + col[None, :]
    query = tl.load(where, inside[:, None] & (col < D)[None, :], 0.0)
    k += at * k_head
    v += at * v_head
    if table is None:
        k += batch * k_batch
        v += batch * v_batch
    else:
        table += batch * table_batch
    slope = None
    if slopes is not None:
        slope = (tl.load(slopes + sample * slope_batch + heads, inside, 0.0) * tiles.LOG2_E)[:, None]
    total = tl.zeros((BM, BD), tl.float32)
    highest = tl.full((BM,), -tiles.INFINITY, tl.float32)
    sum = tl.zeros((BM,), tl.float32)
    last = tl.minimum((first + BM - 1) // G, T - 1)
    start, _, ragged, stop = tiles.keys_seen(first // G + S - T, last + S - T, S, left, right, BN, LEFT)
    piece = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), BN), splits) * BN
    low = start + split * piece
    high = tl.minimum(stop, low + piece)
    middle = low  # from here on the mask decides
    if not LEFT:
        middle = tl.maximum(low, tl.minimum(ragged, high))
        total, highest, sum = _meet(
            total, highest, sum, query, k, v, table, k_batch, k_row, v_batch, v_row, low, middle, own, S, left, right,
            scale, cap, slope, False, LEFT, CAPPED, PRECISION, PAGE, D, BD, BN,
        )  # fmt: skip
    total, highest, sum = _meet(
        total, highest, sum, query, k, v, table, k_batch, k_row, v_batch, v_row, middle, high, own, S, left, right,
        scale, cap, slope, True, LEFT, CAPPED, PRECISION, PAGE, D, BD, BN,
    )  # fmt: skip
    blind = sum == 0.0
    total *= (1.0 / tl.where(blind, 1.0, sum))[:, None]
    log = tl.where(blind, -tiles.INFINITY, (highest + tl.log2(sum)) * tiles.LN_2)
    out += split.to(tl.int64) * out_split + batch * out_batch
    tl.store(
        out + (rows * out_row + heads * out_head)[:, None] + col[None, :],
        total.to(out.dtype.element_ty), inside[:, None] & (col < D)[None, :],
    )  # fmt: skip
    tl.store(lse + split.to(tl.int64) * lse_split + batch * lse_batch + heads * lse_head + rows, log, inside)


@triton.jit(do_not_specialize=["T", "H", "splits"])
def _attention_combine(
    parts, part_lse, out, lse, part_split, lse_split, T, H, splits,
    SPLITS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program i: row i of out (B, T, H, D) from those of all pieces, in order."""
    program = tl.program_id(0).to(tl.int64)
    row = program // H % T
    at = (program // H // T * H + program % H) * T + row
    piece = tl.arange(0, SPLITS)
    logs = tl.load(part_lse + piece.to(tl.int64) * lse_split + at, piece < splits, -tiles.INFINITY)
    highest = tl.max(logs, 0)
    base = tl.where(highest == -tiles.INFINITY, 0.0, highest)
    log = base + tl.log(tl.sum(tl.exp(logs - base), 0))
    log = tl.where(highest == -tiles.INFINITY, -tiles.INFINITY, log)
    tl.store(lse + at, log)
    base = tl.where(highest == -tiles.INFINITY, 0.0, log)
    col = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for i in range(splits):
        weight = tl.exp(tl.load(part_lse + tl.cast(i, tl.int64) * lse_split + at) - base)
        total += weight * tl.load(parts + tl.cast(i, tl.int64) * part_split + program * D + col, col < D, 0.0)
    tl.store(out + program * D + col, total.to(out.dtype.element_ty), col < D)


# --- launchers ---


def decode(q, k, v, table, lengths, slopes, window, scale, softcap):
    """q (B, T, H, D); k, v (B, S, Hkv, D), or with table (B, P) and lengths (B,) pages (pages, size, Hkv, D)
    -> out like q, lse (B, H, T) in fp32."""
    B, T, H, D = q.shape
    Hkv, dtype = k.shape[-2], q.dtype
    out = empty_like(q)
    lse = empty((B, H, T), torch.float32, q.device)
    q, k, v = tiles.by_rows(q, k, v)
    call = tiles.Call(q, k, None, None, slopes, window, scale, softcap, 0.0, (0, 0, 0))
    S = k.shape[1] if table is None else table.shape[1] * k.shape[1]  # with pages the most that there may be
    config = configs.attention_decode(T * (H // Hkv), D, dtype)
    blocks = cdiv(T * (H // Hkv), config.tiles["BM"])
    splits = configs.key_splits(B * Hkv * blocks, S, config)
    parts, part_lse = out, lse
    if splits > 1:
        parts = empty((splits, B, T, H, D), torch.float32, q.device)
        part_lse = empty((splits, B, H, T), torch.float32, q.device)
    distances = (
        *tiles.strides(q, k, v, out), *tiles.lse_strides(lse), 0 if table is None else table.stride(0),
        call.slope_batch, B * T * H * D, B * H * T,
    )  # fmt: skip
    _, _, _, _, G, _, left, right, scale, cap, *_ = call.numbers(0)
    constants = {name: call.constants[name] for name in ("LEFT", "CAPPED", "PRECISION", "D", "BD")}
    launch(
        _attention_decode, (splits * blocks * Hkv * B,), q, k, v, parts, part_lse, table, lengths, call.tensors[-1],
        *distances, T, S, H, G, blocks, splits, left, right, scale, cap, config=config,
        PAGE=k.shape[1] if table is not None else 0, **constants,
    )  # fmt: skip
    if splits > 1:
        launch(
            _attention_combine, (B * T * H,), parts, part_lse, out, lse, B * T * H * D, B * H * T, T, H, splits,
            config=configs.COMBINE, D=D, BD=constants["BD"],
        )  # fmt: skip
    return out, lse
