"""AdamW in Triton: one launch for all tensors of equal dtypes, each element read and written once, in place.

A program owns one piece of one tensor, found through a table of addresses. The math is fp32. The master of a narrow
parameter is fp32, or for bf16 the 16 bits that the parameter lacks; `megakern/ops/adamw.py` defines both. The scale of
the gradients is read on the device, so that clipping never waits for the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakern.kernels.adamw import factors, scale_beside
from megakern.kernels.memory import contiguous_rows
from megakern.kernels.triton import configs
from megakern.kernels.triton.launch import launch
from megakern.kernels.triton.tables import TYPES, address_table, aligned, pieces

# --- kernels ---


@triton.jit
def pointer(table, row, column, COLUMNS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in one cell of the table, as a pointer to TYPE."""
    address = tl.load(table + row * COLUMNS + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _update(
    params, grads, exp_avgs, exp_avg_sqs, masters, at, mask,
    scale, decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps, ZERO: tl.constexpr,
):  # fmt: skip
    """One step of the elements `at`."""
    grad = tl.load(grads + at, mask).to(tl.float32) * scale
    exp_avg = beta1 * tl.load(exp_avgs + at, mask).to(tl.float32) + one_beta1 * grad
    exp_avg_sq = beta2 * tl.load(exp_avg_sqs + at, mask).to(tl.float32) + one_beta2 * grad * grad
    tl.store(exp_avgs + at, exp_avg.to(exp_avgs.dtype.element_ty), mask)
    tl.store(exp_avg_sqs + at, exp_avg_sq.to(exp_avg_sqs.dtype.element_ty), mask)
    if masters is None:
        weight = tl.load(params + at, mask)
    elif masters.dtype.element_ty is tl.int16:
        high = tl.load(params + at, mask).to(tl.int16, bitcast=True).to(tl.int32)
        weight = ((high << 16) + tl.load(masters + at, mask).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        weight = tl.load(masters + at, mask)
    weight = weight * decay - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) * correction + eps)
    bits = weight.to(tl.int32, bitcast=True)
    if masters is not None:
        tl.store(masters + at, bits.to(tl.int16) if masters.dtype.element_ty is tl.int16 else weight, mask)
    if params.dtype.element_ty is tl.bfloat16:  # to nearest, ties away from zero: what 16 more bits undo
        tl.store(params + at, ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask)
    else:
        tl.store(params + at, weight.to(params.dtype.element_ty), mask)
    if ZERO:
        tl.store(grads + at, tl.zeros_like(grad).to(grads.dtype.element_ty), mask)


@triton.jit
def _adamw(
    table, pieces_of, grad_scale, decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, ALIGNED: tl.constexpr,
    ZERO: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program i: the i-th piece of PIECE elements. MASTER None: the parameter itself; int16: its low half."""
    program = tl.program_id(0)
    row = tl.load(pieces_of + 2 * program)
    start = tl.load(pieces_of + 2 * program + 1).to(tl.int64) * PIECE
    COLUMNS: tl.constexpr = 5 if MASTER is None else 6
    params = pointer(table, row, 0, COLUMNS, PARAM, ALIGNED)
    grads = pointer(table, row, 1, COLUMNS, GRAD, ALIGNED)
    exp_avgs = pointer(table, row, 2, COLUMNS, MOMENT, ALIGNED)
    exp_avg_sqs = pointer(table, row, 3, COLUMNS, MOMENT, ALIGNED)
    masters = None if MASTER is None else pointer(table, row, 4, COLUMNS, MASTER, ALIGNED)
    count = tl.load(table + row * COLUMNS + COLUMNS - 1)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    lane = tl.arange(0, TILE)
    if start + PIECE <= count:  # no mask: with one, a load of 16 bytes would have to be 8 loads of 2
        for first in range(0, PIECE, TILE):
            _update(
                params, grads, exp_avgs, exp_avg_sqs, masters, start + first + lane, None,
                scale, decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps, ZERO,
            )  # fmt: skip
    else:
        for begin in range(start, count, TILE):
            _update(
                params, grads, exp_avgs, exp_avg_sqs, masters, begin + lane, begin + lane < count,
                scale, decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps, ZERO,
            )  # fmt: skip


# --- launchers ---


def adamw(
    params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, zero_grads,
    step, lr, beta1, beta2, eps, weight_decay,
):  # fmt: skip
    """Update params, exp_avgs, exp_avg_sqs and masters in place.

    `masters` has one tensor a parameter, fp32 (bf16, fp16 parameters) or the int16 low half (bf16), or is empty (fp32).
    grads are only read, and left as zeros if `zero_grads`.
    """
    grad_scale = scale_beside(params[0], grad_scale)
    rates = factors(step, lr, beta1, beta2, eps, weight_decay)
    config = configs.MANY_TENSORS
    with contiguous_rows(params, grads, exp_avgs, exp_avg_sqs, masters, zero_grads) as groups:
        for dtypes, rows in groups.items():
            param, grad, moment, _, *master = (TYPES[dtype] for dtype in dtypes)
            table, owners = address_table(rows), pieces(rows, config.tiles["PIECE"])
            types = {"PARAM": param, "GRAD": grad, "MOMENT": moment, "MASTER": master[0] if master else None}
            constants = {"ALIGNED": aligned(rows), "ZERO": zero_grads, **types}
            launch(_adamw, (owners.shape[0],), table, owners, grad_scale, *rates, config=config, **constants)
