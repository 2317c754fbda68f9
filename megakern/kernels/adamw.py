"""What the launchers of AdamW's kernels hand over alike: the factors of a step, and the scale of the gradients."""

from __future__ import annotations

import math

import torch


def factors(step, lr, beta1, beta2, eps, weight_decay) -> tuple[float, ...]:
    """In fp64: what the parameter decays to, beta1, 1 - beta1, beta2, 1 - beta2, the size of the step, the correction
    of the second moment's root, eps."""
    correction = 1 / math.sqrt(1 - beta2**step)
    return 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), correction, eps


def scale_beside(param: torch.Tensor, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
    """fp32 on the parameter's device, where the kernel reads it."""
    return None if grad_scale is None else grad_scale.to(param.device, torch.float32)
