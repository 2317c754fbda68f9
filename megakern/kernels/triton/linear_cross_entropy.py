"""Linear + cross-entropy in Triton: chunks of rows, whose logits are made, judged and overwritten by their gradient.

In training with one scalar loss, the gradients are made in the same loop as the loss: the products of `linear.py` add
each chunk's share to an fp32 dweight. They are gradients of the sum of row losses: with no 1/M in them, fp16 does not
underflow.
"""

from __future__ import annotations

import torch

from megakern.kernels.memory import empty, empty_like, nothing, rows_of
from megakern.kernels.torch.cross_entropy import check_targets, shard_of
from megakern.kernels.triton import INTERPRETED, configs
from megakern.kernels.triton.cross_entropy import row_losses, write_gradient
from megakern.kernels.triton.linear import product


class _Problem:
    """The inputs as matrices: x (M, K), weight (V', K) without padding, targets (M,); and the options of the loss."""

    def __init__(self, x, weight, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
        shard = shard_of(weight.shape[0], vocab_size, group)
        self.x, self.weight, self.targets = rows_of(x), rows_of(weight)[: shard.real], targets.reshape(-1).contiguous()
        self.options = (ignore_index, label_smoothing, z_loss, vocab_size, shard)
        if INTERPRETED:
            check_targets("linear_cross_entropy", self.targets, ignore_index, vocab_size)
        # From shapes that all ranks share, padding included, so that all ranks run the same collectives.
        self.rows = configs.logits_rows(weight.shape[0], weight.element_size())

    def chunks(self):
        """For each chunk: its rows as a slice, its logits (rows, V'), which share one buffer."""
        M = self.x.shape[0]
        buffer = empty((min(self.rows, M), self.weight.shape[0]), self.x.dtype, self.x.device)
        for first in range(0, M, self.rows):
            chunk = slice(first, min(first + self.rows, M))
            logits = buffer[: chunk.stop - first]
            product(self.x[chunk], self.weight.t(), logits)
            yield chunk, logits


class _Gradients:
    """dx like x, and dweight (V/R, K) summed in fp32 over chunks; each empty if not wanted."""

    def __init__(self, problem, x, weight, with_dx, with_dweight):
        self.problem, self.wanted = problem, (with_dx, with_dweight)
        self.dx = empty_like(x) if with_dx else nothing(x)
        self.dweight = empty(weight.shape if with_dweight else (0,), torch.float32, weight.device).zero_()

    def add(self, chunk, dlogits):
        with_dx, with_dweight = self.wanted
        x, weight = self.problem.x[chunk], self.problem.weight
        if with_dx:
            product(dlogits, weight, self.dx.view(-1, weight.shape[1])[chunk])
        if with_dweight:
            product(dlogits.t(), x, self.dweight[: weight.shape[0]], accumulate=True)


def linear_cross_entropy_sum(x, weight, targets, with_dx, with_dweight, *options):
    """-> sum of row losses (0-d, fp32), its dx (..., K) or empty, its dweight (V/R, K) in fp32 or empty."""
    problem = _Problem(x, weight, targets, *options)
    losses = empty((problem.x.shape[0],), torch.float32, x.device)
    gradients = _Gradients(problem, x, weight, with_dx, with_dweight)
    for chunk, logits in problem.chunks():
        losses[chunk], lse = row_losses(logits, problem.targets[chunk], *problem.options)
        if with_dx or with_dweight:
            write_gradient(logits, None, logits, problem.targets[chunk], lse, *problem.options)
            gradients.add(chunk, logits)
    return losses.sum(), gradients.dx, gradients.dweight


def linear_cross_entropy_rows(x, weight, targets, *options):
    """-> loss and lse, each of targets' shape, fp32."""
    problem = _Problem(x, weight, targets, *options)
    loss, lse = (empty(problem.targets.shape, torch.float32, x.device) for _ in range(2))
    for chunk, logits in problem.chunks():
        loss[chunk], lse[chunk] = row_losses(logits, problem.targets[chunk], *problem.options)
    return loss.view(targets.shape), lse.view(targets.shape)


def linear_cross_entropy_rows_backward(dloss, x, weight, targets, lse, with_dx, with_dweight, *options):
    """-> dx (..., K) of x's dtype or empty, dweight (V/R, K) in fp32 or empty. The logits are computed again."""
    problem = _Problem(x, weight, targets, *options)
    scale, lse = dloss.reshape(-1), lse.reshape(-1)
    gradients = _Gradients(problem, x, weight, with_dx, with_dweight)
    for chunk, logits in problem.chunks():
        write_gradient(logits, scale[chunk], logits, problem.targets[chunk], lse[chunk], *problem.options)
        gradients.add(chunk, logits)
    return gradients.dx, gradients.dweight
