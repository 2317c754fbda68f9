"""Learning-rate schedules: the rate of step `step` (0-based), a pure function, so that nothing of it needs saving."""

from __future__ import annotations

import math

from megakern.train.config import OptimizerConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Linear warm-up from 0, then the schedule, ending at lr x min_lr_ratio after `steps`.

    cosine: arXiv 1608.03983 without restarts. wsd: warm-up, stable, linear decay over the last `decay_steps`
    (arXiv 2404.06395).
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    low = optimizer.lr * optimizer.min_lr_ratio
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    if optimizer.schedule == "cosine":
        return low + (optimizer.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if optimizer.schedule == "linear":
        return optimizer.lr + (low - optimizer.lr) * progress
    if optimizer.schedule == "wsd":
        left = max(0, steps - step)
        if left < optimizer.decay_steps:
            return low + (optimizer.lr - low) * left / optimizer.decay_steps
    return optimizer.lr
