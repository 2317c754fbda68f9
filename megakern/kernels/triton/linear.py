"""Linear layers in Triton: one persistent matrix product with everything that follows it in its epilogue.

A program computes tiles of the output, one after another, in an order that keeps the operands of neighbouring tiles in
the L2 cache; sums are fp32. Writes = , or += into a weight gradient, rounded once. fp32 operands are multiplied in full
precision (no TF32), as PyTorch does by default. The bias gradient is a column sum of its own: inside the product it
would bring each tile of dy to registers, which the tensor cores of sm_90 read from shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakern.kernels.memory import empty, empty_like, nothing, rows_of
from megakern.kernels.triton import configs, tune
from megakern.kernels.triton.activation import activate, slope
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.norm import sum_parts
from megakern.kernels.triton.tile_config import cdiv

# --- kernels ---


@triton.jit
def _product(
    a, b, out, bias, pre, residual, M, N, K, a_row, a_col, b_row, b_col, out_row, residual_row,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (M, N) (+)= act(a (M, K) b (K, N) + bias) + residual. Program i: tiles i, i + P, ...; pre is contiguous.

    GRADIENT: out = (a b) act'(residual).
    """
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # Not flattened into one loop: the compiler then loses which loads are contiguous, and does not pipeline them.
    for tile in range(tl.program_id(0), down * across, tl.num_programs(0)):
        # Bands of GROUP tile rows, walked column by column.
        band = tile // (GROUP * across)
        height = tl.minimum(down - band * GROUP, GROUP)
        within = tile % (GROUP * across)
        rows = (band * GROUP + within % height) * BM + tl.arange(0, BM)
        cols = (within // height) * BN + tl.arange(0, BN)
        a_rows, b_cols = rows.to(tl.int64) * a_row, cols.to(tl.int64) * b_col
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            deep = start + tl.arange(0, BK)
            left = tl.load(
                a + a_rows[:, None] + deep.to(tl.int64)[None, :] * a_col,
                (rows < M)[:, None] & (deep < K)[None, :], 0.0,
            )  # fmt: skip
            right = tl.load(
                b + deep.to(tl.int64)[:, None] * b_row + b_cols[None, :],
                (deep < K)[:, None] & (cols < N)[None, :], 0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total, input_precision=PRECISION)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        rows = rows.to(tl.int64)[:, None]
        if bias is not None:
            total += tl.load(bias + cols, cols < N, 0.0).to(tl.float32)[None, :]
        if pre is not None:
            total = total.to(pre.dtype.element_ty)  # backward must see the value that the activation saw
            tl.store(pre + rows * N + cols[None, :], total, mask)
            total = total.to(tl.float32)
        if GRADIENT:
            saved = tl.load(residual + rows * residual_row + cols[None, :], mask, 0.0).to(tl.float32)
            total *= slope(saved, ACTIVATION)
        elif ACTIVATION != "":
            total = activate(total, ACTIVATION)
        if residual is not None and not GRADIENT:
            total += tl.load(residual + rows * residual_row + cols[None, :], mask, 0.0).to(tl.float32)
        where = out + rows * out_row + cols[None, :]
        if ACCUMULATE:
            total += tl.load(where, mask, 0.0).to(tl.float32)
        tl.store(where, total.to(out.dtype.element_ty), mask)


@triton.jit
def _column_sums(x, parts, M, N, stride, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr):
    """Program (i, j): columns i COLS to (i + 1) COLS - 1 of row tiles j, j + P, ...; row j of the parts."""
    program = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for tile in tl.range(program, tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + rows * stride + cols, (rows < M) & (cols < N), 0.0).to(tl.float32)
    tl.store(parts + program * N + cols, tl.sum(total, 0, keep_dims=True), cols < N)


# --- launchers ---


def product(a, b, out, *, bias=None, pre=None, residual=None, activation="", gradient=False, accumulate=False):
    """out (M, N) (+)= act(a (M, K) b (K, N) + bias) + residual; a and b with one contiguous dim each, out by rows.

    gradient: out = (a b) act'(residual).
    """
    (M, K), N = a.shape, b.shape[1]
    strides = (*a.stride(), *b.stride(), out.stride(0), 0 if residual is None else residual.stride(0))
    constants = {"ACTIVATION": activation, "GRADIENT": gradient, "ACCUMULATE": accumulate, "PRECISION": "ieee"}

    def call(config):
        tiles = cdiv(M, config.tiles["BM"]) * cdiv(N, config.tiles["BN"])
        grid = (min(tiles, _processors(a.device)),)
        launch(_product, grid, a, b, out, bias, pre, residual, M, N, K, *strides, config=config, **constants)

    heavy = configs.is_heavy(activation, residual is not None)
    choice = configs.product(M, N, K, a.dtype, transposed=a.stride(1) != 1, heavy=heavy, accumulate=accumulate)
    tune.run(choice, out, call, repeats=not accumulate)


def _processors(device: torch.device) -> int:
    """How many programs share the tiles: a matter of speed alone, each tile is computed the same way by any of them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def linear_forward(x, weight, bias, residual, activation, keep):
    """-> y (..., N), pre-activation (..., N) if `keep`, else empty. `activation` is "" for none."""
    N = weight.shape[0]
    y = empty((*x.shape[:-1], N), x.dtype, x.device)
    pre = empty_like(y) if keep else nothing(y)
    product(
        rows_of(x),
        rows_of(weight).t(),
        y.view(-1, N),
        bias=None if bias is None else bias.contiguous(),
        pre=pre if keep else None,
        residual=None if residual is None else rows_of(residual),
        activation=activation,
    )
    return y, pre


def linear_input_gradient(dy, weight, added):
    """-> dx (..., K) from dy (..., N), the gradient before the activation; plus `added` (..., K), or None."""
    K = weight.shape[1]
    dx = empty((*dy.shape[:-1], K), dy.dtype, dy.device)
    product(rows_of(dy), rows_of(weight), dx.view(-1, K), residual=None if added is None else rows_of(added))
    return dx


def linear_weight_gradient(dy, x, weight_dtype, bias_dtype):
    """-> dweight (N, K) of weight_dtype, dbias (N,) of bias_dtype; empty where the dtype is None. Sums are fp32."""
    rows, N, K = rows_of(dy), dy.shape[-1], x.shape[-1]
    with_weight = weight_dtype is not None
    dweight = empty((N, K), weight_dtype, dy.device) if with_weight else nothing(dy)
    if with_weight:
        product(rows.t(), rows_of(x), dweight)
    return dweight, nothing(dy) if bias_dtype is None else _column_sum(rows).to(bias_dtype)


def linear_accumulate_weight_gradient(into, dy, x, bias_dtype):
    """into (N, K), fp32 or of dy's dtype, += dy^T x, rounded once -> dbias as `linear_weight_gradient`."""
    if into.stride(1) == 1:
        product(rows_of(dy).t(), rows_of(x), into, accumulate=True)
    else:
        into.add_(linear_weight_gradient(dy, x, torch.float32, None)[0])
    return linear_weight_gradient(dy, x, None, bias_dtype)[1]


def _column_sum(rows):
    """rows (M, N) -> (N,), fp32."""
    M, N = rows.shape
    config = configs.WEIGHT_GRADIENT_CHUNKS
    columns = cdiv(N, config.tiles["COLS"])
    P = min(cdiv(M, config.tiles["ROWS"]), max(1, configs.persistent(config) // columns))
    parts = empty((P, N), torch.float32, rows.device)
    launch(_column_sums, (columns, P), rows, parts, M, N, rows.stride(0), config=config)
    return sum_parts(parts, torch.float32)[0]
