"""Linear + cross-entropy for any device, chunk of rows by chunk of rows, so that the logits are never all there.

In training with one scalar loss, the gradients are made in the same loop as the loss: d(row loss)/d(logits) is written
over the chunk's logits. They are the gradients of the sum of row losses: with no 1/M in them, fp16 does not underflow.

The launchers take the module that has the kernels of the loss, and the class that has the matrix products. PyTorch's by
default: kernels/cuda/ passes its own.
"""

from __future__ import annotations

import torch

from megakern.kernels.memory import empty, empty_like
from megakern.kernels.torch import cross_entropy, native
from megakern.kernels.torch.cross_entropy import check_targets, shard_of, wide_dtype

# Largest chunk of logits, in bytes. On a GPU larger chunks keep the matrix products long and the sums into dweight few.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


def chunk_rows(V: int, element_size: int, device: str) -> int:
    """How many rows' logits exist at a time, on a device of this type."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE) // (V * element_size))


class Products:
    """The three matrix products of a chunk (a slice of rows), by PyTorch. x (M, K), weight (V', K)."""

    def __init__(self, x, weight, rows):
        """rows: of the largest chunk."""
        self.x, self.weight = x, weight

    def logits(self, chunk):
        """-> x W^T (rows, V')."""
        return torch.mm(self.x[chunk], self.weight.t())

    def input_gradient(self, dlogits, dx):
        """dx (rows, K) = dlogits W."""
        torch.mm(dlogits, self.weight, out=dx)

    def weight_gradient(self, chunk, dlogits, dweight, add):
        """dweight (V', K), fp32 (fp64 for fp64) = dlogits^T x, or += with `add`."""
        x = self.x[chunk]
        if native.takes_weight_gradient(dlogits, x, dweight.dtype):
            native.weight_gradient(dlogits, x, dweight, add=add, with_sums=False)
        elif x.dtype == torch.bfloat16:  # a chunk's product is rounded once, and added in fp32
            share = torch.mm(dlogits.t(), x)
            dweight.add_(share) if add else dweight.copy_(share)
        else:  # fp16 is widened: the sum over a chunk's rows can leave its range
            dweight.addmm_(dlogits.to(dweight.dtype).t(), x.to(dweight.dtype), beta=float(add))


class _Problem:
    """The inputs as matrices: x (M, K), weight (V', K) without padding, targets (M,); and the options of the loss."""

    def __init__(self, products, x, weight, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
        shard = shard_of(weight.shape[0], vocab_size, group)
        self.targets = targets.reshape(-1).contiguous()
        self.options = (ignore_index, label_smoothing, z_loss, vocab_size, shard)
        self.wide = wide_dtype(x.dtype)
        # From shapes that all ranks share, padding included, so that all ranks run the same collectives.
        self.rows = chunk_rows(weight.shape[0], weight.element_size(), x.device.type)
        self.products = products(x.reshape(-1, x.shape[-1]), weight[: shard.real], self.rows)

    def chunks(self):
        """For each chunk: its rows as a slice, its logits (rows, V')."""
        M = self.targets.shape[0]
        for first in range(0, M, self.rows):
            chunk = slice(first, min(first + self.rows, M))
            yield chunk, self.products.logits(chunk)


class _Gradients:
    """dx like x, and dweight (V/R, K) summed in fp32 (fp64 for fp64) over chunks; each empty if not wanted."""

    def __init__(self, problem, x, weight, with_dx, with_dweight):
        self.products, self.wanted = problem.products, (with_dx, with_dweight)
        self.dx = empty_like(x) if with_dx else empty((0,), x.dtype, x.device)
        self.dweight = empty(weight.shape if with_dweight else (0,), problem.wide, weight.device)
        self.real = problem.options[-1].real if x.numel() else 0  # rows that the first chunk writes
        self.dweight[self.real :].zero_()

    def add(self, chunk, dlogits):
        with_dx, with_dweight = self.wanted
        if with_dx:
            self.products.input_gradient(dlogits, self.dx.view(-1, self.dx.shape[-1])[chunk])
        if with_dweight:
            self.products.weight_gradient(chunk, dlogits, self.dweight[: self.real], add=chunk.start > 0)


def linear_cross_entropy_sum(
    x, weight, targets, with_dx, with_dweight, *options, kernels=cross_entropy, products=Products
):
    """-> sum of row losses (0-d, fp32), its dx (..., K) or empty, its dweight (V/R, K) in fp32 or empty."""
    problem = _Problem(products, x, weight, targets, *options)
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


def linear_cross_entropy_rows(x, weight, targets, *options, kernels=cross_entropy, products=Products):
    """-> loss and lse, each of targets' shape, fp32 (fp64 for fp64)."""
    problem = _Problem(products, x, weight, targets, *options)
    check_targets("linear_cross_entropy", problem.targets, options[0], options[3])
    loss = x.new_empty(problem.targets.shape, dtype=problem.wide)
    lse = torch.empty_like(loss)
    for chunk, logits in problem.chunks():
        loss[chunk], lse[chunk] = kernels.row_losses(logits, problem.targets[chunk], *problem.options)
    return loss.view(targets.shape), lse.view(targets.shape)


def linear_cross_entropy_rows_backward(
    dloss, x, weight, targets, lse, with_dx, with_dweight, *options, kernels=cross_entropy, products=Products
):
    """-> dx (..., K) of x's dtype or empty, dweight (V/R, K) in fp32 or empty. The logits are computed again."""
    problem = _Problem(products, x, weight, targets, *options)
    scale, lse = dloss.reshape(-1), lse.view(-1)
    gradients = _Gradients(problem, x, weight, with_dx, with_dweight)
    for chunk, logits in problem.chunks():
        kernels.write_gradient(logits, scale[chunk], logits, problem.targets[chunk], lse[chunk], *problem.options)
        gradients.add(chunk, logits)
    return gradients.dx, gradients.dweight
