"""Linear + cross-entropy for any device, chunk of rows by chunk of rows, so that the logits are never all there.

In training with one scalar loss, the gradients are made in the same loop as the loss: d(row loss)/d(logits) is written
over the chunk's logits. They are the gradients of the sum of row losses: with no 1/M in them, fp16 does not underflow.

The launchers take the module that has the kernels of the loss, PyTorch's by default: kernels/cuda/ passes its own.
"""

from __future__ import annotations

import torch

from megakern.kernels.torch import cross_entropy, native
from megakern.kernels.torch.cross_entropy import check_targets, shard_of, wide_dtype

# Largest chunk of logits, in bytes. On a GPU larger chunks keep the matrix products long and the sums into dweight few.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


class _Problem:
    """The inputs as matrices: x (M, K), weight (V', K) without padding, targets (M,); and the options of the loss."""

    def __init__(self, x, weight, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
        shard = shard_of(weight.shape[0], vocab_size, group)
        self.x, self.weight, self.targets = (
            x.reshape(-1, x.shape[-1]),
            weight[: shard.real],
            targets.reshape(-1).contiguous(),
        )
        self.options = (ignore_index, label_smoothing, z_loss, vocab_size, shard)
        self.wide = wide_dtype(x.dtype)
        limit = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE)
        # From shapes that all ranks share, padding included, so that all ranks run the same collectives.
        self.rows = max(1, limit // (weight.shape[0] * weight.element_size()))

    def chunks(self):
        """For each chunk: its rows as a slice, its logits (rows, V')."""
        for first in range(0, self.x.shape[0], self.rows):
            chunk = slice(first, min(first + self.rows, self.x.shape[0]))
            yield chunk, torch.mm(self.x[chunk], self.weight.t())


class _Gradients:
    """dx like x, and dweight (V/R, K) summed in fp32 (fp64 for fp64) over chunks; each empty if not wanted."""

    def __init__(self, problem, x, weight, with_dx, with_dweight):
        self.problem, self.wanted = problem, (with_dx, with_dweight)
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
        self.dweight = weight.new_zeros(weight.shape if with_dweight else 0, dtype=problem.wide)

    def add(self, chunk, dlogits):
        with_dx, with_dweight = self.wanted
        x, weight = self.problem.x[chunk], self.problem.weight
        if with_dx:
            torch.mm(dlogits, weight, out=self.dx.view(-1, weight.shape[1])[chunk])
        if not with_dweight:
            return
        dweight = self.dweight[: weight.shape[0]]
        if native.takes_weight_gradient(dlogits, x, dweight.dtype):
            native.weight_gradient(dlogits, x, dweight, add=True, with_sums=False)
        elif x.dtype == torch.bfloat16:  # a chunk's product is rounded once, and added in fp32
            dweight.add_(torch.mm(dlogits.t(), x))
        else:  # fp16 is widened: the sum over a chunk's rows can leave its range
            dweight.addmm_(dlogits.to(self.problem.wide).t(), x.to(self.problem.wide))


def linear_cross_entropy_sum(x, weight, targets, with_dx, with_dweight, *options, kernels=cross_entropy):
    """-> sum of row losses (0-d, fp32), its dx (..., K) or empty, its dweight (V/R, K) in fp32 or empty."""
    problem = _Problem(x, weight, targets, *options)
    check_targets("linear_cross_entropy", problem.targets, options[0], options[3])
    total = x.new_zeros((), dtype=problem.wide)
    gradients = _Gradients(problem, x, weight, with_dx, with_dweight)
    for chunk, logits in problem.chunks():
        if with_dx or with_dweight:
            loss = kernels.loss_and_gradient(logits, None, logits, problem.targets[chunk], *problem.options)
            gradients.add(chunk, logits)
        else:
            loss, _ = kernels.row_losses(logits, problem.targets[chunk], *problem.options)
        total += loss.sum()
    return total, gradients.dx, gradients.dweight


def linear_cross_entropy_rows(x, weight, targets, *options, kernels=cross_entropy):
    """-> loss and lse, each of targets' shape, fp32 (fp64 for fp64)."""
    problem = _Problem(x, weight, targets, *options)
    check_targets("linear_cross_entropy", problem.targets, options[0], options[3])
    loss = x.new_empty(problem.targets.shape, dtype=problem.wide)
    lse = torch.empty_like(loss)
    for chunk, logits in problem.chunks():
        loss[chunk], lse[chunk] = kernels.row_losses(logits, problem.targets[chunk], *problem.options)
    return loss.view(targets.shape), lse.view(targets.shape)


def linear_cross_entropy_rows_backward(
    dloss, x, weight, targets, lse, with_dx, with_dweight, *options, kernels=cross_entropy
):
    """-> dx (..., K) of x's dtype or empty, dweight (V/R, K) in fp32 or empty. The logits are computed again."""
    problem = _Problem(x, weight, targets, *options)
    scale, lse = dloss.reshape(-1), lse.view(-1)
    gradients = _Gradients(problem, x, weight, with_dx, with_dweight)
    for chunk, logits in problem.chunks():
        kernels.write_gradient(logits, scale[chunk], logits, problem.targets[chunk], lse[chunk], *problem.options)
        gradients.add(chunk, logits)
    return gradients.dx, gradients.dweight
