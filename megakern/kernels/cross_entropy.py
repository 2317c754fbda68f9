"""Cross-entropy around kernels that know only rows: what the launchers of CUDA and of Triton share."""

from __future__ import annotations

from collections.abc import Callable

from megakern.kernels.memory import empty_like, rows_of
from megakern.kernels.torch.cross_entropy import check_targets, shard_of


def launchers(
    row_losses: Callable, write_gradient: Callable, loss_and_gradient: Callable, *, check: bool
) -> tuple[Callable, ...]:
    """-> cross_entropy_forward, cross_entropy_backward, cross_entropy_in_place over those functions of rows.

    `check`: targets on a CPU are looked at. Not where a compiler may trace the launcher, which has no values.
    """

    def flat(logits, targets, ignore_index, vocab_size):
        targets = targets.reshape(-1).contiguous()
        if check:
            check_targets("cross_entropy", targets, ignore_index, vocab_size)
        return rows_of(logits), targets

    def forward(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
        """-> loss and lse, each of targets' shape, fp32."""
        rows = flat(logits, targets, ignore_index, vocab_size)
        shard = shard_of(logits.shape[-1], vocab_size, group)
        loss, lse = row_losses(*rows, ignore_index, label_smoothing, z_loss, vocab_size, shard)
        return loss.view(targets.shape), lse.view(targets.shape)

    def backward(dloss, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, group):
        """-> dlogits, like logits."""
        dlogits = empty_like(logits)
        V = logits.shape[-1]
        options = (ignore_index, label_smoothing, z_loss, vocab_size, shard_of(V, vocab_size, group))
        rows = rows_of(logits), targets.reshape(-1).contiguous(), lse.reshape(-1)
        write_gradient(dlogits.view(-1, V), dloss.reshape(-1), *rows, *options)
        return dlogits

    def in_place(logits, scale, targets, ignore_index, label_smoothing, z_loss, vocab_size, group):
        """-> loss of targets' shape, fp32; logits become scale (0-d fp32, or None) times their gradient."""
        rows, own = flat(logits, targets, ignore_index, vocab_size)
        shard = shard_of(logits.shape[-1], vocab_size, group)
        scale = None if scale is None else scale.expand(len(own))
        loss = loss_and_gradient(rows, scale, rows, own, ignore_index, label_smoothing, z_loss, vocab_size, shard)
        return loss.view(targets.shape)

    return forward, backward, in_place
