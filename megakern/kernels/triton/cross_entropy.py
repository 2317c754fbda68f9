"""Cross-entropy in Triton: the logits are read once forward, and read and written once backward; writes = .

Forward: one program a row walks the vocabulary with a running maximum. On one rank it makes the loss at once; with a
group, it leaves the row's maximum and sums, and two small kernels stand between and after the MAX and the SUM of ranks.
Backward: one program a piece of a row. `write_gradient` may write over the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.distributed import ReduceOp

from megakern.kernels.cross_entropy import launchers
from megakern.kernels.memory import empty
from megakern.kernels.triton import INTERPRETED, configs, tune
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.tile_config import cdiv
from megakern.parallel.collectives import all_reduce_in_place

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: the maximum of a row of -inf, or of nothing but padding

LOG2_E = tl.constexpr(1.4426950408889634)

# --- kernels ---


@triton.jit
def exp(x):
    """`tl.exp` keeps results below 1e-38, at three instructions more; they count nothing beside the maximum's 1."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _loss(log_sum, peak, at_target, total, target, ignore_index, vocab_size, smoothing, z_loss, SMOOTH: tl.constexpr):
    """-> loss, lse. at_target and total: the target's logit and the sum of logits, relative to the row's maximum."""
    lse = peak + log_sum
    loss = log_sum - at_target
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - total / vocab_size)
    loss += z_loss * lse * lse
    loss = tl.where((target < 0) | (target >= vocab_size), float("nan"), loss)
    return tl.where(target == ignore_index, 0.0, loss), lse


@triton.jit
def _meet_logits(peaks, sums, totals, value, inside, seen, SMOOTH: tl.constexpr):
    """Lanes (1, LANES) with a maximum, and sums relative to it, take in `value` (STEPS, LANES); -inf counts nothing.

    A lane's columns are in one thread, whatever their alignment: none waits for another before the row has ended, and
    there is one exponential more for STEPS columns. seen: columns that a lane has taken in so far, for SMOOTH.
    """
    higher = tl.maximum(peaks, tl.max(value, 0, keep_dims=True))
    value -= higher
    sums = sums * exp(peaks - higher) + tl.sum(exp(value), 0, keep_dims=True)
    if SMOOTH:  # what a lane has seen moves with its maximum
        if inside is not None:
            value = tl.where(inside, value, 0.0)
        totals += (peaks - higher) * seen + tl.sum(value, 0, keep_dims=True)
    return higher, sums, totals


@triton.jit
def _cross_entropy_forward(
    logits, targets, loss, lse, peaks, sums, M, V, stride, start, real, vocab_size, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, FINISH: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program i: row i. FINISH: its loss and lse; else its maximum and (2 or 3, M) sums relative to it."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    target = tl.load(targets + row)
    own = target - start
    owned = (own >= 0) & (own < real) & (target != ignore_index)
    at_target = tl.load(logits + row * stride + own, owned, 0.0).to(tl.float32)  # before the loop: nobody waits for it
    lane_peaks = tl.full((1, LANES), LOWEST, tl.float32)
    lane_sums = tl.zeros((1, LANES), tl.float32)
    lane_totals = tl.zeros((1, LANES), tl.float32)
    whole = real // (STEPS * LANES)
    here = logits + row * stride + lane
    for piece in range(0, whole):
        value = tl.load(here + piece * (STEPS * LANES)).to(tl.float32)
        lane_peaks, lane_sums, lane_totals = _meet_logits(
            lane_peaks, lane_sums, lane_totals, value, None, piece * STEPS, SMOOTH
        )
    inside = whole * (STEPS * LANES) + lane < real
    value = tl.load(here + whole * (STEPS * LANES), inside, float("-inf")).to(tl.float32)
    lane_peaks, lane_sums, lane_totals = _meet_logits(
        lane_peaks, lane_sums, lane_totals, value, inside, whole * STEPS, SMOOTH
    )
    peak = tl.max(lane_peaks)
    at_target = tl.where(owned, at_target - peak, 0.0)
    log_sum = tl.sum(lane_sums * exp(lane_peaks - peak))
    total = 0.0
    if SMOOTH:
        seen = whole * STEPS + tl.sum(inside.to(tl.int32), 0, keep_dims=True)
        total = tl.sum(lane_totals + tl.where(seen > 0, (lane_peaks - peak) * seen, 0.0))
    if FINISH:
        value, row_lse = _loss(
            tl.log(log_sum), peak, at_target, total, target, ignore_index, vocab_size, smoothing, z_loss, SMOOTH
        )
        tl.store(loss + row, value)
        tl.store(lse + row, row_lse)
    else:
        tl.store(peaks + row, peak)
        tl.store(sums + row, log_sum)
        tl.store(sums + M + row, at_target)
        if SMOOTH:
            tl.store(sums + 2 * M + row, total)


@triton.jit
def _cross_entropy_shift(
    sums, peaks, highest, targets, M, start, real, ignore_index, SMOOTH: tl.constexpr, ROWS: tl.constexpr
):
    """Program i: makes the sums of ROWS rows relative to the maximum over all ranks, in place."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < M
    move = tl.load(peaks + rows, mask, 0.0) - tl.load(highest + rows, mask, 0.0)
    target = tl.load(targets + rows, mask, 0)
    owned = (target >= start) & (target < start + real) & (target != ignore_index)
    tl.store(sums + rows, tl.load(sums + rows, mask, 0.0) * tl.exp(move), mask)
    tl.store(sums + M + rows, tl.load(sums + M + rows, mask, 0.0) + tl.where(owned, move, 0.0), mask)
    if SMOOTH:
        tl.store(sums + 2 * M + rows, tl.load(sums + 2 * M + rows, mask, 0.0) + move * real, mask)


@triton.jit
def _cross_entropy_finish(
    sums, highest, targets, loss, lse, M, vocab_size, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program i: loss and lse of ROWS rows from the sums over all ranks."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < M
    total = tl.zeros((ROWS,), tl.float32)
    if SMOOTH:
        total = tl.load(sums + 2 * M + rows, mask, 0.0)
    value, row_lse = _loss(
        tl.log(tl.load(sums + rows, mask, 1.0)), tl.load(highest + rows, mask, 0.0),
        tl.load(sums + M + rows, mask, 0.0), total, tl.load(targets + rows, mask, 0),
        ignore_index, vocab_size, smoothing, z_loss, SMOOTH,
    )  # fmt: skip
    tl.store(loss + rows, value, mask)
    tl.store(lse + rows, row_lse, mask)


@triton.jit
def _cross_entropy_gradient(
    out, scales, logits, targets, lse, C, out_stride, scale_stride, stride, start, real, vocab_size, ignore_index,
    smoothing, z_loss, COLS: tl.constexpr,
):  # fmt: skip
    """Program i: COLS columns of one row of out; zeros in padding columns and in ignored rows."""
    across = tl.cdiv(C, COLS)
    row = (tl.program_id(0) // across).to(tl.int64)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    target = tl.load(targets + row)
    counted = target != ignore_index
    value = tl.load(logits + row * stride + cols, counted & (cols < real), float("-inf")).to(tl.float32)
    row_lse = tl.load(lse + row)
    scale = 1.0
    if scales is not None:
        scale = tl.load(scales + row * scale_stride).to(tl.float32)
    gradient = scale * (1.0 + 2.0 * z_loss * row_lse) * tl.exp(value - row_lse) - scale * (smoothing / vocab_size)
    gradient += tl.where(cols == target - start, scale * (smoothing - 1.0), 0.0)
    gradient = tl.where(counted & (cols < real), gradient, 0.0)
    tl.store(out + row * out_stride + cols, gradient.to(out.dtype.element_ty), cols < C)


@triton.jit
def _cross_entropy_scale(x, factor, N, COLS: tl.constexpr):
    """Program i: COLS elements of x times the factor; nothing where that is 1."""
    scale = tl.load(factor)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
        value = tl.load(x + at, at < N).to(tl.float32) * scale
        tl.store(x + at, value.to(x.dtype.element_ty), at < N)


# --- launchers ---


def row_losses(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """logits (M, V/R), targets (M,) -> loss (M,), lse (M,), fp32."""
    M, V = logits.shape
    loss, lse = (empty((M,), torch.float32, logits.device) for _ in range(2))
    smooth = label_smoothing > 0
    choice = configs.cross_entropy(M, V, logits.dtype)
    sizes = (M, V, logits.stride(0), shard.start, shard.real, vocab_size)
    options = (ignore_index, label_smoothing, z_loss)

    def forward(*outputs, finish):
        def call(config):
            constants = {"SMOOTH": smooth, "FINISH": finish}
            launch(
                _cross_entropy_forward, (M,), logits, targets, *outputs, *sizes, *options, config=config, **constants
            )

        tune.run(choice, logits, call)

    if shard.group is None:
        forward(loss, lse, None, None, finish=True)
        return loss, lse
    peaks = empty((M,), torch.float32, logits.device)
    sums = empty((3 if smooth else 2, M), torch.float32, logits.device)
    forward(None, None, peaks, sums, finish=False)
    highest = peaks.clone()
    all_reduce_in_place(highest, shard.group, ReduceOp.MAX)
    rows = {"config": configs.ROW_SUMS, "SMOOTH": smooth}
    grid = (cdiv(M, configs.ROW_SUMS.tiles["ROWS"]),)
    launch(_cross_entropy_shift, grid, sums, peaks, highest, targets, M, shard.start, shard.real, ignore_index, **rows)
    all_reduce_in_place(sums, shard.group)
    launch(_cross_entropy_finish, grid, sums, highest, targets, loss, lse, M, vocab_size, *options, **rows)
    return loss, lse


def write_gradient(out, scale, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """out (M, V/R) = scale d(row loss)/d(logits); `out` may be `logits`. scale (M,), or None for 1."""
    M, C = out.shape
    strides = (out.stride(0), 0 if scale is None else scale.stride(0), logits.stride(0))
    options = (shard.start, shard.real, vocab_size, ignore_index, label_smoothing, z_loss)

    def call(config):
        grid = (M * cdiv(C, config.tiles["COLS"]),)
        launch(_cross_entropy_gradient, grid, out, scale, logits, targets, lse, C, *strides, *options, config=config)

    choice = configs.cross_entropy_gradient(M, C, logits.dtype)
    tune.run(choice, out, call, repeats=out is not logits)


def scale_(x, factor):
    """x *= factor (0-d fp32, on x's device), in place; x, contiguous, is not even read where factor is 1."""
    config = configs.CROSS_ENTROPY_GRADIENT[0]
    launch(_cross_entropy_scale, (cdiv(x.numel(), config.tiles["COLS"]),), x, factor, x.numel(), config=config)


def loss_and_gradient(out, scale, logits, targets, *options):
    """-> loss (M,), fp32; out as `write_gradient`."""
    loss, lse = row_losses(logits, targets, *options)
    write_gradient(out, scale, logits, targets, lse, *options)
    return loss


cross_entropy_forward, cross_entropy_backward, cross_entropy_in_place = launchers(
    row_losses, write_gradient, loss_and_gradient, check=INTERPRETED
)
