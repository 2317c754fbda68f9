"""Launchers of csrc/linear.cu: the products of a linear layer on sm_90a, and the sums of columns for its bias gradient.

The copy engine wants rows that start on multiples of 16 bytes: other views are copied first. bf16 and fp16 alone.
"""

from __future__ import annotations

import functools

import torch

from megakern.kernels.cuda.activation import KINDS
from megakern.kernels.cuda.linear_plan import GATED, NN, NT, TN, choose, epilogue_weight
from megakern.kernels.cuda.module import DTYPES, call, pointer
from megakern.kernels.memory import empty, empty_like, nothing, rows_of

# Steps by which one consumer of a cooperative tile is ahead of the other: their epilogues take turns. On an H200 with 2
# 8192^3 was 1.2 % faster, 4096^3 0.4 %.
HEAD_START = 2
BAND = 2048  # rows of the output whose tiles are walked column by column, for the L2 cache: 1024 and 4096 within 1 %
BLOCKS_ON_A_CPU = 4  # of the persistent kernel under simt: fewer than the tiles of the tests


def product(
    layout, a, b, out, *, b_up=None, bias=None, bias_up=None, residual=None, saved=None, saved_up=None, out_up=None,
    pre=None, pre_up=None, dbias=None, activation="", accumulate=False, plan=None, band=BAND, head_start=HEAD_START,
    blocks=None,
):  # fmt: skip
    """out (M, N) (+)= what csrc/api.h says of a layout, A (M, K) and B (K, N); with TN dbias (M,): sums of A's rows."""
    (M, N), K = out.shape, a.shape[0 if layout == TN else 1]
    blocks = blocks or multiprocessors(out.device)
    if plan is None:
        weight = epilogue_weight(
            bias=bias is not None,
            activation=bool(activation) or layout == GATED or saved_up is not None,
            residual=residual is not None or saved is not None or (accumulate and out.dtype != torch.float32),
            wide=out.dtype == torch.float32,
        )
        plan = choose(M, 2 * N if layout == GATED else N, K, blocks, layout, weight)
    tile, split = plan.tile, plan.tiles - plan.whole
    sums = parts = arrivals = None
    if dbias is not None:
        sums = empty((4 * plan.splits, M), torch.float32, out.device)
    if split:
        parts = empty((split, plan.splits, tile.rows, tile.cols), torch.float32, out.device)
        arrivals = empty((split, 4), torch.int32, out.device).zero_()
        if sums is not None:
            sums.zero_()  # a tile in one part writes 4 of the rows
    tensors = a, b, b_up, bias, bias_up, residual, saved, saved_up, out, out_up, pre, pre_up, sums
    strides = (0 if x is None else x.stride(0) for x in (a, b, b_up, residual, saved, saved_up, out))
    call(
        "linear_product", out, *map(pointer, tensors), DTYPES[a.dtype], DTYPES[out.dtype],
        DTYPES[a.dtype if bias is None else bias.dtype], layout, KINDS[activation] if activation else -1, accumulate,
        M, N, K, *strides, tile.rows, tile.cols, tile.cluster, band, head_start, blocks,
        plan.splits, plan.whole, pointer(parts), pointer(arrivals),
    )  # fmt: skip
    if dbias is not None:
        _add_parts(sums, dbias)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks share the tiles. It decides which of them are split along K, so the last bits of a sum may differ
    between GPUs with other counts, never between runs."""
    return BLOCKS_ON_A_CPU if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def operand(x):
    """x (..., C) as (M, C) whose rows start on multiples of 16 bytes, apart from each other; a copy if no view is."""
    rows = rows_of(x)
    size = rows.element_size()
    if rows.shape[0] == 1:
        rows = rows.as_strided(rows.shape, (rows.shape[1], 1))  # the stride of a single row says nothing
    if rows.data_ptr() % 16 or rows.stride(0) * size % 16 or rows.stride(0) < rows.shape[1]:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows


def linear_forward(x, weight, bias, residual, activation, keep):
    """-> y (..., N), pre-activation (..., N) if `keep`, else empty. `activation` is "" for none."""
    N = weight.shape[0]
    y = empty((*x.shape[:-1], N), x.dtype, x.device)
    pre = empty_like(y) if keep else nothing(y)
    if y.numel():
        product(
            NT,
            operand(x),
            operand(weight),
            y.view(-1, N),
            bias=None if bias is None else operand(bias)[0],
            pre=pre if keep else None,
            residual=None if residual is None else operand(residual),
            activation=activation,
        )
    return y, pre


def linear_input_gradient(dy, weight, added):
    """-> dx (..., K) from dy (..., N), the gradient before the activation; plus `added` (..., K), or None."""
    K = weight.shape[1]
    dx = empty((*dy.shape[:-1], K), dy.dtype, dy.device)
    if dx.numel():
        residual = None if added is None else operand(added)
        product(NN, operand(dy), operand(weight), dx.view(-1, K), residual=residual)
    return dx


def linear_weight_gradient(dy, x, weight_dtype, bias_dtype):
    """-> dweight (N, K) of weight_dtype, dbias (N,) of bias_dtype; empty where the dtype is None. Sums are fp32.

    Where both are wanted, dbias is summed from the tiles of dy that the product of dweight reads.
    """
    rows, N, K = operand(dy), dy.shape[-1], x.shape[-1]
    with_weight = weight_dtype is not None
    dweight = empty((N, K), weight_dtype, dy.device) if with_weight else nothing(dy)
    dbias = _bias_gradient(N, bias_dtype, dy)
    if not rows.shape[0]:
        dweight.zero_(), dbias.zero_()
    elif with_weight:
        product(TN, rows, operand(x), dweight, dbias=dbias if bias_dtype else None)
    elif bias_dtype is not None:
        _column_sums(rows, dbias)
    return dweight, dbias


def linear_accumulate_weight_gradient(into, dy, x, bias_dtype):
    """into (N, K), fp32 or of dy's dtype, += dy^T x, rounded once -> dbias as `linear_weight_gradient`."""
    unaligned = into.data_ptr() % 16 or into.stride(0) * into.element_size() % 16
    if into.stride(1) != 1 or unaligned or not dy.numel():
        dweight, dbias = linear_weight_gradient(dy, x, torch.float32, bias_dtype)
        into.add_(dweight)
        return dbias
    dbias = _bias_gradient(dy.shape[-1], bias_dtype, dy)
    product(TN, operand(dy), operand(x), into, accumulate=True, dbias=dbias if bias_dtype else None)
    return dbias


def _bias_gradient(N, dtype, dy):
    return nothing(dy) if dtype is None else empty((N,), dtype, dy.device)


def _column_sums(rows, out):
    """out (N,) = sums of the columns of rows (M, N)."""
    M, N = rows.shape
    columns = -(-N // 256)  # blocks across; 8 to a multiprocessor keep its memory busy, with 64 rows for each or more
    P = max(1, min(-(-M // 64), 8 * multiprocessors(rows.device) // columns))
    parts = empty((P, N), torch.float32, rows.device)
    call("column_sums", rows, pointer(rows), pointer(parts), DTYPES[rows.dtype], M, N, rows.stride(0), P)
    _add_parts(parts, out)


def _add_parts(parts, out):
    """out (N,) = sum of parts (P, N) over P."""
    P, N = parts.shape
    call("part_sums", out, pointer(parts), pointer(out), DTYPES[out.dtype], N, P)
