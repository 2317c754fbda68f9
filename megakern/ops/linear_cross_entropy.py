"""Cross-entropy of x W^T, without ever holding all the logits.

    logits = x W^T;  loss = cross_entropy(logits, targets)        options and row loss: see cross_entropy.py

Shapes: x (..., K), weight (V/R, K), targets (...) int64. M = product of the leading dims. Logits exist for one chunk of
rows at a time, in the dtype of x.

    reduction "mean", "sum"    the gradients of the summed loss are made in forward, chunk by chunk, and backward
                               multiplies them by the upstream scalar: 6 M V K FLOPs a step instead of 8.
                               Saved: dx (in x's dtype), dweight (fp32)
    reduction "none"           each row has its own upstream gradient: backward computes the logits again.
                               Saved: x, weight, targets, lse

With a `group`, x is replicated and each chunk has one MAX and one SUM over the ranks in forward; dx is this rank's
partial sum, which the caller all-reduces (wrap x in `copy_to_tensor_parallel`); dweight is complete.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megakern.ops import autocast, checks
from megakern.ops.cross_entropy import (
    OPTIONS,
    check_options,
    cross_entropy_reference,
    whole_vocabulary,
)
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve
from megakern.ops.gradients import target_of


def linear_cross_entropy_reference(x, weight, targets, **options):
    """The whole vocabulary on one rank; options as in `cross_entropy_reference`."""
    return cross_entropy_reference(x @ weight.to(x.dtype).t(), targets, **options)


def _check(x, weight, targets) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"linear_cross_entropy: weight must have shape (V, K) with V, K > 0, got {tuple(weight.shape)}"
        )
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x must have shape (..., K) with K = {weight.shape[1]} of weight (V, K), "
            f"got {tuple(x.shape)}; weight is (out, in), as in torch.nn.Linear"
        )
    checks.floating("linear_cross_entropy", x=x)
    checks.same_or_fp32("linear_cross_entropy", "x", x, weight=weight)
    checks.shape("linear_cross_entropy", "targets", targets, tuple(x.shape[:-1]), "(...) of x (..., K)")
    checks.same_device("linear_cross_entropy", "x", x, "targets", targets)


@describes("linear_cross_entropy")
def _problem(
    x,
    weight,
    targets,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    group=None,
    vocab_size=None,
) -> Problem:
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "ranks": 1 if group is None else group.size(),
    }
    sizes = {"M": targets.numel(), "K": weight.shape[1], "V": weight.shape[0]}
    return Problem("linear_cross_entropy", x.device.type, x.dtype, sizes, options)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_gradients(x, weight, with_dx, with_dweight, dweight_dtype):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_dx else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if with_dweight else 0, dtype=dweight_dtype)


# --- one scalar loss: the gradients are outputs of the forward op ---


def _in_chunks(*arguments):
    """Always opaque to a compiler: it would unroll the loop over chunks."""
    return True


def _sum(x, weight, targets, with_dx, with_dweight, *options):
    *options, backend = options
    launch = launcher(backend, "linear_cross_entropy", "linear_cross_entropy_sum")
    return launch(x, weight.to(x.dtype), targets, with_dx, with_dweight, *options)


def _sum_fake(x, weight, targets, with_dx, with_dweight, *options):
    return x.new_empty((), dtype=_wide(x)), *_empty_gradients(x, weight, with_dx, with_dweight, _wide(x))


def _sum_setup_context(ctx, inputs, output):
    _, dx, dweight = output
    ctx.weight_dtype = target_of(inputs[1]).dtype
    ctx.save_for_backward(dx, dweight)
    ctx.mark_non_differentiable(dx, dweight)
    ctx.set_materialize_grads(False)


def _sum_backward(ctx, dtotal, _ddx, _ddweight):
    dx, dweight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    if dtotal is None:
        needs_x = needs_weight = False
    # In fp32: a 1/M times a loss scale, rounded to bf16 or fp16 first, would be off by up to 0.4 %.
    return (
        (dx.to(dtotal.dtype) * dtotal).to(dx.dtype) if needs_x else None,
        (dweight * dtotal).to(ctx.weight_dtype) if needs_weight else None,
        *([None] * 9),
    )


_linear_cross_entropy_sum = register(
    "linear_cross_entropy_sum",
    f"(Tensor x, Tensor weight, Tensor targets, bool with_dx, bool with_dweight, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    forward=_sum,
    fake=_sum_fake,
    setup_context=_sum_setup_context,
    backward=_sum_backward,
    opaque=_in_chunks,
)


# --- one loss a row ---


def _rows(x, weight, targets, *options):
    *options, backend = options
    return launcher(backend, "linear_cross_entropy", "linear_cross_entropy_rows")(
        x, weight.to(x.dtype), targets, *options
    )


def _rows_fake(x, weight, targets, *options):
    loss = x.new_empty(targets.shape, dtype=_wide(x))
    return loss, torch.empty_like(loss)


def _rows_backward(dloss, x, weight, targets, lse, with_dx, with_dweight, *options):
    *options, backend = options
    launch = launcher(backend, "linear_cross_entropy", "linear_cross_entropy_rows_backward")
    return launch(dloss, x, weight.to(x.dtype), targets, lse, with_dx, with_dweight, *options)


def _rows_backward_fake(dloss, x, weight, targets, lse, with_dx, with_dweight, *options):
    return _empty_gradients(x, weight, with_dx, with_dweight, _wide(x))


_linear_cross_entropy_rows_backward = register(
    "linear_cross_entropy_rows_backward",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, bool with_dx, bool with_dweight, "
    f"{OPTIONS}) -> (Tensor, Tensor)",
    forward=_rows_backward,
    fake=_rows_backward_fake,
    opaque=_in_chunks,
)


def _rows_setup_context(ctx, inputs, output):
    x, weight, targets, *ctx.options = inputs
    ctx.weight_dtype = target_of(weight).dtype
    _, lse = output
    ctx.save_for_backward(x, weight, targets, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _rows_autograd_backward(ctx, dloss, _dlse):
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    if dloss is None:
        return (None,) * 9
    dx, dweight = _linear_cross_entropy_rows_backward(dloss, *ctx.saved_tensors, needs_x, needs_weight, *ctx.options)
    return dx if needs_x else None, dweight.to(ctx.weight_dtype) if needs_weight else None, *([None] * 7)


_linear_cross_entropy_rows = register(
    "linear_cross_entropy_rows",
    f"(Tensor x, Tensor weight, Tensor targets, {OPTIONS}) -> (Tensor, Tensor)",
    forward=_rows,
    fake=_rows_fake,
    setup_context=_rows_setup_context,
    backward=_rows_autograd_backward,
    opaque=_in_chunks,
)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of x W^T against class indices, in chunks of rows; fp32 (fp64 for fp64).

    x (..., K), weight (V, K) of x's dtype or fp32, targets (...) int64. With `group`, weight is (V/R, K), this rank's
    equal part of the vocabulary, x and targets are the same on all ranks, and the gradient of x is this rank's partial
    sum. Other options and errors are those of `cross_entropy`. Returns a scalar, or (...) for reduction "none".
    """
    low = autocast.autocast_dtype(x)
    if low is not None:
        x, (weight,) = x.to(low), autocast.readable(low, weight)
    _check(x, weight, targets)
    check_options("linear_cross_entropy", targets, ignore_index, label_smoothing, z_loss, reduction)
    size = whole_vocabulary("linear_cross_entropy", weight.shape[0], vocab_size, group)
    problem = _problem(
        x, weight, targets, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, group=group
    )
    name = "" if group is None else group.group_name
    options = (ignore_index, label_smoothing, z_loss, size, name, resolve(problem, backend))
    if reduction == "none":
        return _linear_cross_entropy_rows(x, weight, targets, *options)[0]
    training = torch.is_grad_enabled()
    total, _, _ = _linear_cross_entropy_sum(
        x, weight, targets, training and x.requires_grad, training and weight.requires_grad, *options
    )
    return total if reduction == "sum" else total / (targets != ignore_index).sum()
