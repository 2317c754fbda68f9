"""LayerNorm and RMSNorm in Triton, forward and backward, deterministic: weight gradients through per-program sums.

Writes every output whole (=). Rows up to the limits in `configs.py` are read once and stay in registers; wider ones are
walked in chunks twice, the second time out of the L2 cache. The sums over rows for dweight and dbias are made in fp32
by a fixed number of programs and added up by a second kernel in a fixed order: no atomics. Statistics are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakern.kernels.memory import empty, empty_like, nothing, rows_of
from megakern.kernels.triton import configs, tune
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.tile_config import cdiv

# --- kernels ---


@triton.jit
def _norm_forward_rows(
    x, residual, weight, bias, y, h, mean, rstd, M, C, x_stride, residual_stride, eps,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program i: rows i ROWS to (i + 1) ROWS - 1, whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows < M) & (cols < C)
    value = tl.load(x + rows * x_stride + cols, mask, 0.0)
    if residual is not None:
        value = value.to(tl.float32) + tl.load(residual + rows * residual_stride + cols, mask, 0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty)  # statistics are those of the rounded sum, which backward reads
        tl.store(h + rows * C + cols, value, mask)
    value = value.to(tl.float32)
    if CENTRE:
        centre = tl.sum(value, 1, keep_dims=True) / C
        tl.store(mean + rows, centre, rows < M)
        value = tl.where(cols < C, value - centre, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + eps)
    tl.store(rstd + rows, scale, rows < M)
    value = value * scale * tl.load(weight + cols, cols < C, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, cols < C, 0.0).to(tl.float32)
    tl.store(y + rows * C + cols, value.to(y.dtype.element_ty), mask)


@triton.jit
def _norm_forward_chunks(
    x, residual, weight, bias, y, h, mean, rstd, C, x_stride, residual_stride, eps,
    CENTRE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program i: row i, in chunks of COLS. Moments of chunks are merged (Chan, Golub and LeVeque 1979)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, COLS)
    centre = 0.0
    squares = 0.0
    for start in range(0, C, COLS):
        cols = start + lane
        value = tl.load(x + row * x_stride + cols, cols < C, 0.0)
        if residual is not None:
            value = value.to(tl.float32) + tl.load(residual + row * residual_stride + cols, cols < C, 0.0).to(
                tl.float32
            )
            value = value.to(h.dtype.element_ty)
            tl.store(h + row * C + cols, value, cols < C)
        value = value.to(tl.float32)
        if CENTRE:
            count = tl.minimum(C - start, COLS).to(tl.float32)
            chunk_centre = tl.sum(value) / count
            offset = chunk_centre - centre
            share = count / (start + count)
            value = tl.where(cols < C, value - chunk_centre, 0.0)
            squares += tl.sum(value * value) + offset * offset * start * share
            centre += offset * share
        else:
            squares += tl.sum(value * value)
    scale = tl.rsqrt(squares / C + eps)
    tl.store(rstd + row, scale)
    if CENTRE:
        tl.store(mean + row, centre)
    for start in range(0, C, COLS):
        cols = start + lane
        value = tl.load(x + row * x_stride + cols, cols < C, 0.0)
        if residual is not None:  # added again, not read back from h: a store of this program may not be visible yet
            value = value.to(tl.float32) + tl.load(residual + row * residual_stride + cols, cols < C, 0.0).to(
                tl.float32
            )
            value = value.to(h.dtype.element_ty)
        value = (value.to(tl.float32) - centre) * scale * tl.load(weight + cols, cols < C, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + cols, cols < C, 0.0).to(tl.float32)
        tl.store(y + row * C + cols, value.to(y.dtype.element_ty), cols < C)


@triton.jit
def _norm_backward_rows(
    dy, dh, h, weight, mean, rstd, dx, dweight_parts, dbias_parts, M, C, dy_stride, dh_stride, h_stride,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program i of P: row tiles i, i + P, ...; row i of the parts gets its sums over these rows."""
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    scale = tl.load(weight + cols, cols < C, 0.0).to(tl.float32)
    share = 1.0 / C
    # A sum for each row of a tile and column: what threads add up between them is added once, behind the loop.
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    # Tiles of the next rows are on their way through shared memory; their statistics, a few bytes, come a tile ahead
    # in registers: a load within the tile would make it wait for memory once more.
    rows = program * ROWS + lane
    next_inverse = tl.load(rstd + rows, rows < M, 0.0)
    if CENTRE:
        next_centre = tl.load(mean + rows, rows < M, 0.0)
    for tile in tl.range(program, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + lane
        mask = (rows < M) & (cols < C)
        gradient = tl.load(dy + rows * dy_stride + cols, mask, 0.0).to(tl.float32)
        normed = tl.load(h + rows * h_stride + cols, mask, 0.0).to(tl.float32)
        inverse = next_inverse
        ahead = (tile + tl.num_programs(0)) * ROWS + lane
        next_inverse = tl.load(rstd + ahead, ahead < M, 0.0)
        if CENTRE:
            normed -= next_centre
            next_centre = tl.load(mean + ahead, ahead < M, 0.0)
        normed *= inverse
        dweight += gradient * normed
        if dbias_parts is not None:
            dbias += gradient
        gradient *= scale
        if CENTRE and ROWS == 1:  # both sums in one reduction: half the barriers
            along, level = tl.split(tl.sum(tl.join(gradient * normed, gradient), 1))
            along, level = along[:, None], level[:, None]
        else:  # each row of a tile lies within one warp
            along = tl.sum(gradient * normed, 1, keep_dims=True)
            level = tl.sum(gradient, 1, keep_dims=True) if CENTRE else 0.0
        out = gradient * inverse - (normed * (along * share * inverse) + level * share * inverse)
        if dh is not None:
            out += tl.load(dh + rows * dh_stride + cols, mask, 0.0).to(tl.float32)
        tl.store(dx + rows * C + cols, out.to(dx.dtype.element_ty), mask)
    tl.store(dweight_parts + program * C + cols, tl.sum(dweight, 0, keep_dims=True), cols < C)
    if dbias_parts is not None:
        tl.store(dbias_parts + program * C + cols, tl.sum(dbias, 0, keep_dims=True), cols < C)


@triton.jit
def _norm_backward_chunks(
    dy, dh, h, weight, mean, rstd, dx, C, dy_stride, dh_stride, h_stride,
    CENTRE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program i: dx of row i, in chunks of COLS."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, COLS)
    inverse = tl.load(rstd + row)
    centre = 0.0
    if CENTRE:
        centre = tl.load(mean + row)
    along = tl.zeros((COLS,), tl.float32)
    level = tl.zeros((COLS,), tl.float32)
    for start in range(0, C, COLS):
        cols = start + lane
        normed = tl.load(h + row * h_stride + cols, cols < C, 0.0, eviction_policy="evict_last")
        normed = (normed.to(tl.float32) - centre) * inverse
        gradient = tl.load(dy + row * dy_stride + cols, cols < C, 0.0, eviction_policy="evict_last").to(tl.float32)
        gradient *= tl.load(weight + cols, cols < C, 0.0).to(tl.float32)
        along += gradient * normed
        if CENTRE:
            level += gradient
    slope = tl.sum(along) / C
    shift = tl.sum(level) / C
    for start in range(0, C, COLS):
        cols = start + lane
        normed = tl.load(h + row * h_stride + cols, cols < C, 0.0, eviction_policy="evict_first")
        normed = (normed.to(tl.float32) - centre) * inverse
        gradient = tl.load(dy + row * dy_stride + cols, cols < C, 0.0, eviction_policy="evict_first").to(tl.float32)
        gradient *= tl.load(weight + cols, cols < C, 0.0).to(tl.float32)
        out = (gradient - normed * slope - shift) * inverse
        if dh is not None:
            out += tl.load(dh + row * dh_stride + cols, cols < C, 0.0).to(tl.float32)
        tl.store(dx + row * C + cols, out.to(dx.dtype.element_ty), cols < C)


@triton.jit
def _norm_weight_gradient_chunks(
    dy, h, mean, rstd, dweight_parts, dbias_parts, M, C, dy_stride, h_stride,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns i COLS to (i + 1) COLS - 1 of row tiles j, j + P, ...; row j of the parts."""
    program = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(program, tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (rows < M) & (cols < C)
        gradient = tl.load(dy + rows * dy_stride + cols, mask, 0.0).to(tl.float32)
        normed = tl.load(h + rows * h_stride + cols, mask, 0.0).to(tl.float32)
        if CENTRE:
            normed -= tl.load(mean + rows, rows < M, 0.0)
        dweight += gradient * (normed * tl.load(rstd + rows, rows < M, 0.0))
        if dbias_parts is not None:
            dbias += gradient
    tl.store(dweight_parts + program * C + cols, tl.sum(dweight, 0, keep_dims=True), cols < C)
    if dbias_parts is not None:
        tl.store(dbias_parts + program * C + cols, tl.sum(dbias, 0, keep_dims=True), cols < C)


@triton.jit(do_not_specialize=["P"])  # as many as programs fit: no machine code of its own for multiples of 16
def _sum_parts(
    parts, out, more_parts, more_out, P, C, PARTS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Program (i, 0): out[c] = sum of parts[:, c], in order, for columns i COLS to (i + 1) COLS - 1; (i, 1): more."""
    if more_parts is not None:  # noqa: SIM102 - decided when it is compiled
        if tl.program_id(1) == 1:
            parts, out = more_parts, more_out
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((PARTS, COLS), tl.float32)
    for start in tl.range(0, P, PARTS, num_stages=STAGES):
        rows = (start + tl.arange(0, PARTS)[:, None]).to(tl.int64)
        total += tl.load(parts + rows * C + cols, (rows < P) & (cols < C), 0.0)
    tl.store(out + cols, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), cols < C)


# --- launchers ---

FEW_ROWS = 1024  # with fewer, a launch costs more than any choice gains: nothing is tuned


def norm_forward(x, weight, bias, residual, eps, centre):
    """-> y (..., C), h (..., C) or empty, mean (...) or empty, rstd (...); statistics fp32."""
    C = x.shape[-1]
    y = empty_like(x)
    h = nothing(x) if residual is None else empty_like(x)
    rstd = empty(x.shape[:-1], torch.float32, x.device)
    mean = empty_like(rstd) if centre else nothing(rstd)
    x = rows_of(x)
    added = None if residual is None else rows_of(residual)
    tensors = (x, added, weight.contiguous(), None if bias is None else bias.contiguous(), y, h, mean, rstd)
    strides = (x.stride(0), 0 if added is None else added.stride(0))
    M = x.shape[0]

    def call(config):
        if "ROWS" not in config.tiles:
            launch(_norm_forward_chunks, (M,), *tensors, C, *strides, eps, config=config, CENTRE=centre)
        else:
            grid = (cdiv(M, config.tiles["ROWS"]),)
            launch(_norm_forward_rows, grid, *tensors, M, C, *strides, eps, config=config, CENTRE=centre)

    choice = configs.norm("forward", C, x.dtype, centre, residual is not None)
    tune.run(choice, y, call, repeats=M >= FEW_ROWS)
    return y, h, mean, rstd


def norm_backward(dy, dh, h, weight, mean, rstd, with_bias, centre):
    """-> dx (..., C) with dh added, dweight (C,), dbias (C,) or empty."""
    C = h.shape[-1]
    dx = empty_like(h)
    weight = weight.contiguous()
    dy, h = rows_of(dy), rows_of(h)
    dh = None if dh is None else rows_of(dh)
    M, dh_stride = h.shape[0], 0 if dh is None else dh.stride(0)
    strides = (dy.stride(0), dh_stride, h.stride(0))
    parts = (None, None)

    def call(config):
        nonlocal parts
        if "ROWS" not in config.tiles:
            tensors = (dy, dh, h, weight, mean, rstd, dx)
            launch(_norm_backward_chunks, (M,), *tensors, C, *strides, config=config, CENTRE=centre)
            parts = _weight_gradient_parts(dy, h, mean, rstd, with_bias, centre)
        else:
            P = min(cdiv(M, config.tiles["ROWS"]), configs.persistent(config))
            parts = _parts(P, C, with_bias, h.device)
            tensors = (dy, dh, h, weight, mean, rstd, dx, *parts)
            launch(_norm_backward_rows, (P,), *tensors, M, C, *strides, config=config, CENTRE=centre)

    choice = configs.norm("backward", C, h.dtype, centre, dh is not None)
    tune.run(choice, dx, call, repeats=M >= FEW_ROWS)
    dweight_parts, dbias_parts = parts
    dweight, dbias = sum_parts(dweight_parts, weight.dtype, dbias_parts)
    return dx, dweight, dbias


def _weight_gradient_parts(dy, h, mean, rstd, with_bias, centre):
    (M, C), config = h.shape, configs.WEIGHT_GRADIENT_CHUNKS
    columns = cdiv(C, config.tiles["COLS"])
    P = min(cdiv(M, config.tiles["ROWS"]), max(1, configs.persistent(config) // columns))
    parts = _parts(P, C, with_bias, h.device)
    tensors, strides = (dy, h, mean, rstd, *parts), (dy.stride(0), h.stride(0))
    launch(_norm_weight_gradient_chunks, (columns, P), *tensors, M, C, *strides, config=config, CENTRE=centre)
    return parts


def _parts(P, C, with_bias, device):
    dweight_parts = empty((P, C), torch.float32, device)
    return dweight_parts, empty((P, C), torch.float32, device) if with_bias else None


def sum_parts(parts, dtype, more=None):
    """parts (P, C) and more, fp32 -> (C,) of `dtype` for each: the sum over P in a fixed order, 0 for P = 0.

    One launch, so that neither waits for the other. Without `more` the second result is empty.
    """
    P, C = parts.shape
    out = empty((C,), dtype, parts.device)
    more_out = nothing(out) if more is None else empty_like(out)
    config = configs.SUM_PARTS
    grid = (cdiv(C, config.tiles["COLS"]), 1 if more is None else 2)
    launch(_sum_parts, grid, parts, out, more, more_out, P, C, config=config)
    return out, more_out
