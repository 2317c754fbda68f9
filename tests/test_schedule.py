"""Learning-rate schedules and loss scaling. No device needed."""

from __future__ import annotations

import math

import pytest
import torch

from megakern.train.config import OptimizerConfig
from megakern.train.scaler import LossScaler
from megakern.train.schedule import learning_rate


def rates(steps: int, **settings) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(step, steps, optimizer) for step in range(steps)]


def test_cosine_matches_torch():
    parameter = torch.zeros(1, requires_grad=True)
    theirs = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20, eta_min=0.1)
    expected = []
    for _ in range(20):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        schedule.step()
    assert rates(20, schedule="cosine") == pytest.approx(expected, rel=1e-12)


def test_warmup_reaches_the_peak_and_then_decays():
    got = rates(10, schedule="linear", warmup_steps=4, min_lr_ratio=0.0)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_constant_and_wsd():
    assert rates(5, schedule="constant") == [1.0] * 5
    got = rates(8, schedule="wsd", warmup_steps=2, decay_steps=3, min_lr_ratio=0.1)
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4])


def test_no_schedule_rises_after_its_end():
    for name in ("cosine", "linear", "wsd", "constant"):
        optimizer = OptimizerConfig(lr=1.0, schedule=name, decay_steps=2)
        assert learning_rate(30, 20, optimizer) <= learning_rate(19, 20, optimizer) + 1e-12
    assert math.isclose(learning_rate(20, 20, OptimizerConfig(lr=1.0)), 0.1)


def test_loss_scale_halves_after_two_overflows_and_doubles_after_a_window():
    scaler = LossScaler(scale=1024.0, window=3)
    seen = []
    for finite in (False, True, False, False, True, True, True, True, False, False):
        scaler.update(finite)
        seen.append(scaler.scale)
    assert seen == [1024, 1024, 512, 256, 256, 256, 512, 512, 512, 256]
    other = LossScaler()
    other.restore(scaler.state())
    assert other.state() == scaler.state()
    low = LossScaler(scale=1.0, overflows=5)
    low.update(False)
    assert low.scale == 1.0
