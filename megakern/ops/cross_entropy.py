"""Cross-entropy of logits against class indices, with label smoothing, z-loss, and a sharded vocabulary.

    lse = log(sum over v of exp(logits_v))                           v: the real columns, global index < vocab_size
    row loss = (1 - a) (lse - logits_target) + a (lse - mean of logits_v) + z lse^2

a is `label_smoothing` (Szegedy et al. 2016, arXiv 1512.00567), z is `z_loss` (Chowdhery et al. 2022, arXiv 2204.02311).
Rows whose target is `ignore_index` have loss and gradient 0. "mean" divides by the number of other rows (NaN if there
are none, as torch.nn.functional.cross_entropy), "sum" does not divide.

Shapes: logits (..., V/R), targets (...) int64, row losses and lse (...), fp32 (fp64 for fp64 logits).
Gradient, made in the logits' dtype: dlogits = dloss ((1 + 2 z lse) softmax - (1 - a) onehot - a / vocab_size).
Saved for backward: logits, targets, lse. Logits are read forward, and read and written backward: 6 bytes an element of
bf16. With `in_place` the forward pass writes the gradient over the logits, 1 / (number of counted rows) included (not
in fp16, where it would underflow), and saves that alone: 4 bytes, and no second tensor. Backward multiplies it by the
upstream gradient, another 4 bytes unless that is 1.

With a `group` of R ranks, rank r holds columns [r V/R, (r+1) V/R), all of one size; what crosses ranks is one MAX of
(M,) and one SUM of (2, M) or (3, M) in forward, nothing in backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import increment_version

from megakern.ops import checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_reference(
    logits, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", vocab_size=None
):
    """The whole vocabulary on one rank."""
    wide = logits[..., :vocab_size].to(_wide(logits))
    log_p = F.log_softmax(wide, dim=-1)
    counted = targets != ignore_index
    nll = -log_p.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    rows = (1 - label_smoothing) * nll
    if label_smoothing:  # not 0 times the mean, which is NaN where a logit is -inf
        rows = rows - label_smoothing * log_p.mean(-1)
    if z_loss:
        rows = rows + z_loss * wide.logsumexp(-1).square()
    return reduce_rows(torch.where(counted, rows, 0), targets, ignore_index, reduction)


def reduce_rows(rows, targets, ignore_index, reduction):
    if reduction == "none":
        return rows
    return rows.sum() / (targets != ignore_index).sum() if reduction == "mean" else rows.sum()


def check_options(op: str, targets, ignore_index, label_smoothing, z_loss, reduction) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be int64 class indices, got {targets.dtype}; cast them with .long()")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {ignore_index!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be 0 or more and finite, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def whole_vocabulary(op: str, columns: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> int:
    """The number of real columns over all ranks. Raises ValueError if `vocab_size` is not in (0, V]."""
    V = columns if group is None else columns * group.size()
    if V == 0:
        raise ValueError(f"{op}: the vocabulary must have at least one column, got 0")
    if vocab_size is not None and not 0 < vocab_size <= V:
        raise ValueError(f"{op}: vocab_size must be from 1 to the {V} columns of all ranks, got {vocab_size}")
    return V if vocab_size is None else vocab_size


def _check(logits, targets) -> None:
    checks.floating("cross_entropy", logits=logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits must have shape (..., V), got ()")
    checks.shape("cross_entropy", "targets", targets, tuple(logits.shape[:-1]), "(...) of logits (..., V)")
    checks.same_device("cross_entropy", "logits", logits, "targets", targets)


def _check_in_place(logits, reduction) -> None:
    if reduction == "none":
        raise ValueError(
            'cross_entropy: in_place needs reduction "mean" or "sum", got "none", whose rows have their own gradients'
        )
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "cross_entropy: in_place writes over the logits, which must not be a leaf that needs a gradient"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"cross_entropy: in_place writes over the logits, which must be contiguous, got strides {logits.stride()}"
        )


@describes("cross_entropy")
def _problem(
    logits,
    targets,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    group=None,
    vocab_size=None,
    in_place=False,
) -> Problem:
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "ranks": 1 if group is None else group.size(),
        "in_place": in_place,
    }
    return Problem(
        "cross_entropy", logits.device.type, logits.dtype, {"M": targets.numel(), "V": logits.shape[-1]}, options
    )


# --- custom ops. `group` is the name of a process group, "" for none. ---

OPTIONS = "int ignore_index, float label_smoothing, float z_loss, SymInt vocab_size, str group, str backend"


def _forward(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, group, backend):
    launch = launcher(backend, "cross_entropy", "cross_entropy_forward")
    return launch(logits, targets, ignore_index, label_smoothing, z_loss, vocab_size, group)


def _wide(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake(logits, targets, *options):
    loss = logits.new_empty(targets.shape, dtype=_wide(logits))
    return loss, torch.empty_like(loss)


def _backward(dloss, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, group, backend):
    launch = launcher(backend, "cross_entropy", "cross_entropy_backward")
    return launch(dloss, logits, targets, lse, ignore_index, label_smoothing, z_loss, vocab_size, group)


_cross_entropy_backward = register(
    "cross_entropy_backward",
    f"(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, {OPTIONS}) -> Tensor",
    forward=_backward,
    fake=lambda dloss, logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


_cross_entropy_in_place = register(
    "cross_entropy_in_place",
    f"(Tensor(a!) logits, Tensor? scale, Tensor targets, {OPTIONS}) -> Tensor",
    forward=lambda *a: launcher(a[-1], "cross_entropy", "cross_entropy_in_place")(*a[:-1]),
    fake=lambda logits, scale, targets, *options: _fake(logits, targets)[0],
    opaque=lambda *arguments: True,
)

_scale = register(
    "cross_entropy_scale",
    "(Tensor(a!) x, Tensor factor, str backend) -> ()",
    forward=lambda x, factor, backend: launcher(backend, "cross_entropy", "scale_")(x, factor),
    fake=lambda *arguments: None,
    opaque=lambda *arguments: True,
)


class _InPlace(torch.autograd.Function):
    """Scalar loss whose gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, label_smoothing, z_loss, reduction, *options):
        ctx.backend, ctx.spent = options[-1], False
        counted = (targets != ignore_index).sum() if reduction == "mean" else None
        early = counted is not None and logits.dtype != torch.float16
        ctx.late = None if early else counted
        scale = counted.to(_wide(logits)).reciprocal() if early else None
        loss_options = (ignore_index, label_smoothing, z_loss, *options)
        rows = _cross_entropy_in_place(logits.detach(), scale, targets, *loss_options)
        increment_version(logits)  # whoever saved them for a backward pass of its own gets an error, not our gradient
        ctx.save_for_backward(logits)
        total = rows.sum()
        return total if counted is None else total / counted

    @staticmethod
    def backward(ctx, dtotal):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: in_place=True has no second derivative; use in_place=False for one")
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy: a second backward pass through in_place=True, which makes one gradient and gave it "
                "away; use in_place=False where a graph is kept"
            )
        ctx.spent = True
        dlogits = ctx.saved_tensors[0].detach()
        _scale(dlogits, dtotal if ctx.late is None else dtotal / ctx.late, ctx.backend)
        return dlogits, *([None] * 8)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.options = inputs
    _, lse = output
    ctx.save_for_backward(logits, targets, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dloss, _dlse):
    dlogits = None if dloss is None else _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, *([None] * 7)


_cross_entropy = register(
    "cross_entropy",
    f"(Tensor logits, Tensor targets, {OPTIONS}) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
    opaque=lambda *arguments: arguments[-2] != "",  # a group: collectives stand between its kernels
)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    in_place: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of logits (..., V) against class indices, in fp32 (fp64 for fp64 logits).

    logits (..., V) of any floating dtype, targets (...) int64. With `group`, logits are (..., V/R), this rank's equal
    part of the vocabulary, targets are the same on all ranks and so is the result. Columns with global index of
    `vocab_size` or more are padding and never count. Returns a scalar, or (...) for reduction "none".

    `in_place`: where logits, contiguous, need a gradient, it is written over them in the forward pass, and they are
    lost: a third less memory traffic and no second tensor of their size. It can be used once: a second backward pass
    raises RuntimeError, and so does one that needs the logits. A function that torch.compile compiles ignores it.
    Raises ValueError or TypeError on wrong arguments; IndexError on a target outside the vocabulary (on the CPU; on
    other devices its row's loss is NaN).
    """
    _check(logits, targets)
    check_options("cross_entropy", targets, ignore_index, label_smoothing, z_loss, reduction)
    size = whole_vocabulary("cross_entropy", logits.shape[-1], vocab_size, group)
    problem = _problem(
        logits,
        targets,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        group=group,
        in_place=in_place,
    )
    options = (size, "" if group is None else group.group_name, resolve(problem, backend))
    if in_place:
        _check_in_place(logits, reduction)
        if logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _InPlace.apply(logits, targets, ignore_index, label_smoothing, z_loss, reduction, *options)
    rows, _ = _cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, *options)
    return reduce_rows(rows, targets, ignore_index, reduction)
