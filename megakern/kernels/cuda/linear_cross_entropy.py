"""Linear + cross-entropy: the chunks and matrix products of the `torch` backend, the loss by csrc/cross_entropy.cu.

A chunk's logits are read once and overwritten by their gradient, where a row fits on the chip.
"""

from __future__ import annotations

from functools import partial

from megakern.kernels.cuda import cross_entropy
from megakern.kernels.torch import linear_cross_entropy as chunks

linear_cross_entropy_sum = partial(chunks.linear_cross_entropy_sum, kernels=cross_entropy)
linear_cross_entropy_rows = partial(chunks.linear_cross_entropy_rows, kernels=cross_entropy)
linear_cross_entropy_rows_backward = partial(chunks.linear_cross_entropy_rows_backward, kernels=cross_entropy)
