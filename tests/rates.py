"""This processor's matmul rates, measured once: each run takes 0.3 to 0.6 s for them, and no test looks at them."""

from __future__ import annotations

import functools

import torch

from megakern.train import machine


def measure_once() -> None:
    """From now on in this process, and in what is forked from it."""
    rate = functools.cache(functools.partial(machine.matmul_rate, seconds=0.05))
    machine.matmul_rate = lambda dtype, device, seconds=0.1: rate(dtype, device)


def measure_now() -> None:
    """On one thread, so that forks have none to miss."""
    for dtype in (torch.float32, torch.bfloat16):
        machine.matmul_rate(dtype, torch.device("cpu"))
