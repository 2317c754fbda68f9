"""Cross-entropy for any device, row block by row block, so that fp32 temporaries stay in the cache.

Per row: maximum, sum of exponentials, target logit and (for label smoothing) the sum of logits, all relative to the
maximum, in one reading of the logits. Vocabulary-parallel ranks then exchange one MAX and one SUM of these per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.distributed_c10d import _resolve_process_group

from megakern.kernels.torch import native
from megakern.parallel.collectives import all_reduce_in_place

# Elements of a row block. 2^17 in fp32 is half a megabyte: of 2^15, 2^17 and 2^19 the fastest in both directions on a
# Xeon core with 2 MB of L2, at V = 1024 and V = 50304.
BLOCK = 1 << 17


class Shard(NamedTuple):
    """The columns of this rank: global indices from `start`, of which the first `real` are not padding."""

    group: ProcessGroup | None
    start: int
    real: int


def shard_of(columns: int, vocab_size: int, group_name: str) -> Shard:
    """`columns` is V/R, the same on every rank; `vocab_size` counts the real columns of all ranks."""
    group = _resolve_process_group(group_name) if group_name else None
    start = columns * (group.rank() if group is not None else 0)
    return Shard(group, start, min(max(vocab_size - start, 0), columns))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_targets(op, targets, ignore_index, vocab_size):
    """Raises IndexError on the CPU. Other devices are not waited for: see `row_losses`."""
    if targets.device.type == "cpu" and targets.numel() > 0:
        bad = _out_of_range(targets, ignore_index, vocab_size)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"{op}: targets must be in [0, {vocab_size}) or ignore_index = {ignore_index}, "
                f"got {int(targets[row])} in row {row}"
            )


def _out_of_range(targets, ignore_index, vocab_size):
    return ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)


def row_blocks(rows: int, columns: int, device: torch.device):
    """(first, last) of each block of about BLOCK elements a CPU thread; on other devices of 64 blocks."""
    elements = BLOCK * (torch.get_num_threads() if device.type == "cpu" else 64)
    step = max(1, elements // max(columns, 1))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def owned_targets(targets, ignore_index, shard):
    """-> column of each target on this rank (0 where it has none), mask of rows whose target is on this rank."""
    column = targets - shard.start
    owned = (column >= 0) & (column < shard.real) & (targets != ignore_index)
    return torch.where(owned, column, 0), owned


def row_losses(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """logits (M, V/R), targets (M,) -> loss (M,), lse (M,), in fp32 (fp64 for fp64)."""
    M, wide = logits.shape[0], wide_dtype(logits.dtype)
    column, owned = owned_targets(targets, ignore_index, shard)
    # Rows of `sums`: sum of exponentials, target logit, sum of logits, each relative to the row's maximum.
    sums = logits.new_zeros(3 if label_smoothing else 2, M, dtype=wide)
    lowest = torch.finfo(wide).min  # for rows of -inf, and for ranks that hold nothing but padding
    peak = logits.new_full((M,), lowest, dtype=wide)
    if shard.real > 0 and native.takes(logits):
        native.cross_entropy_sums(logits[:, : shard.real], column, peak, sums)
        sums[1].masked_fill_(~owned, 0)
    elif shard.real > 0:
        for first, last in row_blocks(M, shard.real, logits.device):
            rows = logits[first:last, : shard.real]
            top = rows.amax(-1, keepdim=True).to(wide).clamp_(min=lowest)
            shifted = torch.sub(rows, top)  # bf16 - fp32 is fp32
            sums[1, first:last] = shifted.gather(1, column[first:last, None]).squeeze(1)
            if label_smoothing:
                sums[2, first:last] = shifted.sum(-1)
            sums[0, first:last] = shifted.exp_().sum(-1)
            peak[first:last] = top.squeeze(1)
        sums[1].masked_fill_(~owned, 0)
    if shard.group is not None:
        own_peak, peak = peak, peak.clone()
        all_reduce_in_place(peak, shard.group, ReduceOp.MAX)
        shift = own_peak - peak
        sums[0].mul_(shift.exp())
        sums[1].add_(shift.masked_fill(~owned, 0))
        if label_smoothing and shard.real > 0:
            sums[2].add_(shift, alpha=shard.real)
        all_reduce_in_place(sums, shard.group)
    log_sum = sums[0].log()
    lse = peak + log_sum
    loss = log_sum - sums[1]
    if label_smoothing:
        uniform = log_sum - sums[2] / vocab_size
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = loss.masked_fill(targets == ignore_index, 0)
    if targets.device.type != "cpu":  # not checked before, and silently wrong otherwise
        loss = loss.masked_fill(_out_of_range(targets, ignore_index, vocab_size), float("nan"))
    return loss, lse


def write_gradient(out, scale, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, shard):
    """out (M, V/R) = scale d(row loss)/d(logits); `out` may be `logits`. scale (M,) or a number."""
    wide = lse.dtype
    column, owned = owned_targets(targets, ignore_index, shard)
    scale = torch.where(targets == ignore_index, 0, torch.as_tensor(scale, dtype=wide, device=out.device))
    factor = scale * (1 + 2 * z_loss * lse) if z_loss else scale
    at_target = (scale * (label_smoothing - 1)).masked_fill(~owned, 0)
    out[:, shard.real :] = 0
    if shard.real == 0:
        return
    if native.takes(logits, out):
        uniform = scale * (label_smoothing / vocab_size) if label_smoothing else None
        target = out[:, : shard.real]
        native.cross_entropy_gradient(logits[:, : shard.real], column, lse, factor, uniform, at_target, target)
        return
    for first, last in row_blocks(out.shape[0], shard.real, out.device):
        rows, target_rows = logits[first:last, : shard.real], out[first:last, : shard.real]
        if out.dtype == wide:
            gradient = torch.sub(rows, lse[first:last, None], out=target_rows)
        else:
            gradient = torch.sub(rows, lse[first:last, None])
        gradient.exp_().mul_(factor[first:last, None])
        if label_smoothing:
            gradient.sub_((scale[first:last, None]) * (label_smoothing / vocab_size))
        gradient.scatter_add_(1, column[first:last, None], at_target[first:last, None])
        if out.dtype != wide:
            target_rows.copy_(gradient)


def loss_and_gradient(out, scale, logits, targets, *options):
    """-> loss (M,); out as `write_gradient`."""
    loss, lse = row_losses(logits, targets, *options)
    write_gradient(out, 1.0 if scale is None else scale, logits, targets, lse, *options)
    return loss


def scale_(x, factor):
    """x *= factor (0-d, of the wide dtype), in place; x is contiguous. The CPU does not read it where factor is 1."""
    if factor.device.type == "cpu" and factor == 1:
        return
    flat = x.view(-1)
    for first, last in row_blocks(x.numel(), 1, x.device):  # x.mul_(factor) would round the factor to x's dtype first
        block = flat[first:last]
        block.copy_(block.to(factor.dtype).mul_(factor))


def cross_entropy_forward(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
    """-> loss and lse, each of targets' shape, fp32 (fp64 for fp64)."""
    flat = targets.reshape(-1)
    check_targets("cross_entropy", flat, ignore_index, vocab_size)
    shard = shard_of(logits.shape[-1], vocab_size, group)
    rows = logits.reshape(-1, logits.shape[-1])
    loss, lse = row_losses(rows, flat, ignore_index, label_smoothing, z_loss, vocab_size, shard)
    return loss.view(targets.shape), lse.view(targets.shape)


def cross_entropy_backward(dloss, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, group):
    """-> dlogits, like logits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    V = logits.shape[-1]
    write_gradient(
        dlogits.view(-1, V),
        dloss.reshape(-1),
        logits.reshape(-1, V),
        targets.reshape(-1),
        lse.view(-1),
        ignore_index,
        label_smoothing,
        z_loss,
        vocab_size,
        shard_of(V, vocab_size, group),
    )
    return dlogits


def cross_entropy_in_place(logits, scale, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
    """-> loss of targets' shape, fp32 (fp64 for fp64); logits become scale (0-d, or None) times their gradient."""
    flat = targets.reshape(-1)
    check_targets("cross_entropy", flat, ignore_index, vocab_size)
    rows = logits.view(-1, logits.shape[-1])
    options = (ignore_index, label_smoothing, z_loss, vocab_size, shard_of(logits.shape[-1], vocab_size, group))
    return loss_and_gradient(rows, scale, rows, flat, *options).view(targets.shape)
