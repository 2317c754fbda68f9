"""AdamW for the devices that have PyTorch's fused kernel (CPU, CUDA and others).

If the parameters, gradients and moments of a call are all fp32 (or all fp64) and nothing scales the gradients, it is
one call of that kernel. Otherwise each tensor goes through it block by block, with fp32 copies of what is narrower:
they stay in the cache, so that memory is read and written once, in the narrow dtypes.
"""

from __future__ import annotations

import torch

# Elements of a block on a CPU thread: of 2^15 to 2^18 the fastest for 11 million parameters (Xeon core, 2 MB of L2).
BLOCK = 1 << 17


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


def adamw(params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, step, *options):
    """Update params, exp_avgs, exp_avg_sqs and masters in place; options are lr, beta1, beta2, eps, weight_decay.

    `masters` has one fp32 tensor a parameter (bf16, fp16), or is empty (fp32, fp64). grads are only read.
    """
    if grad_scale is not None and grad_scale.device.type == "cpu" and grad_scale.item() == 1:
        grad_scale = None
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    options = (torch.tensor(float(step), device=params[0].device), *options)
    operands = list(zip(masters or params, grads, exp_avgs, exp_avg_sqs, strict=True))
    plain = grad_scale is None and not masters
    if plain and all(t.dtype == wide and t.is_contiguous() for row in operands for t in row):
        _fused(params, grads, exp_avgs, exp_avg_sqs, *options)
        return
    size = BLOCK * torch.get_num_threads() if params[0].device.type == "cpu" else 1 << 30
    for param, row in zip(params, operands, strict=True):
        weight, grad, exp_avg, exp_avg_sq = (t.reshape(-1) for t in row)  # only a strided weight or grad is copied
        for first in range(0, weight.numel(), size):
            block = slice(first, first + size)
            wide_grad = grad[block].to(wide)
            if grad_scale is not None:
                wide_grad = wide_grad * grad_scale.to(wide)
            moments = [t[block] for t in (exp_avg, exp_avg_sq)]
            wide_moments = [t.to(wide) for t in moments]
            _fused([weight[block]], [wide_grad], *([t] for t in wide_moments), *options)
            for narrow, new in zip(moments, wide_moments, strict=True):
                if narrow.dtype != wide:
                    narrow.copy_(new)
        if not row[0].is_contiguous():
            row[0].copy_(weight.view(row[0].shape))
        if masters:
            param.copy_(row[0])
