"""Linear + cross-entropy: the chunks of the `torch` backend, the loss by csrc/cross_entropy.cu, products by linear.cu.

A chunk's logits are read once and overwritten by their gradient, where a row fits on the chip. What csrc/linear.cu
cannot multiply (limits.py), PyTorch does.
"""

from __future__ import annotations

from functools import partial

from megakern.kernels.cuda import cross_entropy, linear
from megakern.kernels.cuda.limits import loss_products_refusal
from megakern.kernels.cuda.linear import operand
from megakern.kernels.cuda.linear_plan import NN, NT, TN
from megakern.kernels.memory import empty
from megakern.kernels.torch import linear_cross_entropy as chunks


class _Products:
    """What chunks.Products has. All logits lie in one buffer, whose rows start on multiples of 16 bytes for any V'."""

    def __init__(self, x, weight, rows):
        self.x, self.weight = operand(x), operand(weight)
        wide = -(-weight.shape[0] // 8) * 8
        self.buffer = empty((min(rows, x.shape[0]), wide), x.dtype, x.device)

    def logits(self, chunk):
        logits = self.buffer[: chunk.stop - chunk.start, : self.weight.shape[0]]
        linear.product(NT, self.x[chunk], self.weight, logits)
        return logits

    def input_gradient(self, dlogits, dx):
        linear.product(NN, dlogits, self.weight, dx)

    def weight_gradient(self, chunk, dlogits, dweight, add):
        linear.product(TN, dlogits, self.x[chunk], dweight, accumulate=add)


def _products(x, weight, rows):
    refused = loss_products_refusal(x.device.type, x.dtype, x.shape[0], *weight.shape)
    # A rank with nothing but padding has no logits.
    return (chunks.Products if refused or not weight.numel() else _Products)(x, weight, rows)


_ours = {"kernels": cross_entropy, "products": _products}
linear_cross_entropy_sum = partial(chunks.linear_cross_entropy_sum, **_ours)
linear_cross_entropy_rows = partial(chunks.linear_cross_entropy_rows, **_ours)
linear_cross_entropy_rows_backward = partial(chunks.linear_cross_entropy_rows_backward, **_ours)
