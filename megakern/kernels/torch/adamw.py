"""AdamW for the devices that have PyTorch's fused kernel (CPU, CUDA and others).

On CPUs with AVX-512 fp32 and bf16 tensors go through our C++ kernel (csrc/cpu/adamw.cpp), whatever the scale: one pass
over memory. 11 million parameters with fp32 moments, ms of two Xeon cores, in brackets without it: fp32 6.6 (6.5), with
scaled gradients 6.3 (12.5), bf16 with split masters 8.1 (33).

Elsewhere through PyTorch's. If the parameters, gradients and moments of a call are all fp32 (or all fp64) and nothing
scales the gradients, it is one call of that kernel. Otherwise each tensor goes through it block by block, with fp32
copies of what is narrower: they stay in the cache, so that memory is read and written once, in the narrow dtypes. The
master of a bf16 parameter is whole, or its low half, which is joined with the parameter and split again block by block.
"""

from __future__ import annotations

import torch

from megakern.kernels.adamw import factors
from megakern.kernels.memory import contiguous_rows
from megakern.kernels.torch import native

# Elements of a block on a CPU thread: of 2^15 to 2^18 the fastest for 11 million parameters (Xeon core, 2 MB of L2).
BLOCK = 1 << 17
# Elsewhere: 64 MiB for each fp32 copy, many times what it takes to fill a GPU.
DEVICE_BLOCK = 1 << 24


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> its rounding to bf16 (ties away from zero), and the int16 that `join_master` needs to undo it."""
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(param: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """bf16 and int16 of one shape, from `split_master` -> the fp32 master, bit for bit."""
    return (param.view(torch.int16).to(torch.int32) << 16).add_(low).view(torch.float32)


def _fused(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay):
    """`step` is a 0-d tensor, which the kernel only reads."""
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(params),
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adamw(params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, zero_grads, step, *options):
    """Update params, exp_avgs, exp_avg_sqs and masters in place; options are lr, beta1, beta2, eps, weight_decay.

    `masters` has one tensor a parameter, fp32 (bf16, fp16 parameters) or the int16 low half (bf16), or is empty (fp32,
    fp64). grads are only read, and left as zeros if `zero_grads`.
    """
    if native.takes_many(params, grads, exp_avgs, exp_avg_sqs, masters=masters):
        scale = 1.0 if grad_scale is None else grad_scale.item()
        with contiguous_rows(params, grads, exp_avgs, exp_avg_sqs, masters, zero_grads) as groups:
            native.adamw(groups, scale, zero_grads, factors(step, *options))
        return
    if grad_scale is not None and grad_scale.device.type == "cpu" and grad_scale.item() == 1:
        grad_scale = None
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    options = (torch.tensor(float(step), device=params[0].device), *options)
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    if grad_scale is None and all(t.dtype == wide and t.is_contiguous() for row in rows for t in row):
        _fused(params, grads, exp_avgs, exp_avg_sqs, *options)
    else:
        for row, master in zip(rows, masters or [None] * len(rows), strict=True):
            _by_blocks(*row, master, grad_scale, wide, options)
    if zero_grads:
        torch._foreach_zero_(grads)


def _by_blocks(param, grad, exp_avg, exp_avg_sq, master, grad_scale, wide, options):
    size = BLOCK * torch.get_num_threads() if param.device.type == "cpu" else DEVICE_BLOCK
    flat, grad = param.reshape(-1), grad.reshape(-1)  # copies where they are strided; the states never are
    exp_avg, exp_avg_sq = exp_avg.view(-1), exp_avg_sq.view(-1)
    master = None if master is None else master.view(-1)
    split = master is not None and master.dtype == torch.int16
    for first in range(0, flat.numel(), size):
        block = slice(first, first + size)
        narrow = flat[block]
        if split:
            weight = join_master(narrow, master[block])
        else:
            weight = narrow if master is None else master[block]
        wide_grad = grad[block].to(wide)
        if grad_scale is not None:
            wide_grad = wide_grad * grad_scale.to(wide)
        moments = [t[block] for t in (exp_avg, exp_avg_sq)]
        wide_moments = [t.to(wide) for t in moments]
        _fused([weight], [wide_grad], *([t] for t in wide_moments), *options)
        for moment, new in zip(moments, wide_moments, strict=True):
            if moment.dtype != wide:
                moment.copy_(new)
        if narrow.dtype == torch.bfloat16:
            rounded, low = split_master(weight)
            narrow.copy_(rounded)
            if split:
                master[block].copy_(low)
        elif master is not None:
            narrow.copy_(weight)
    if not param.is_contiguous():
        param.copy_(flat.view(param.shape))
