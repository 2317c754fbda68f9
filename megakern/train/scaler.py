"""Dynamic loss scaling for fp16 (arXiv 1710.03740), with hysteresis: one overflow alone does not halve it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScaler:
    """The factor on the loss: halved after `hysteresis` overflows, doubled after `window` steps without one."""

    scale: float = 65536.0
    window: int = 1000
    hysteresis: int = 2
    good_steps: int = 0
    overflows: int = 0

    def update(self, finite: bool) -> None:
        if not finite:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(1.0, self.scale / 2)
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2
            self.overflows = 0

    def state(self) -> dict[str, float | int]:
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def restore(self, state: dict[str, float | int]) -> None:
        self.scale, self.good_steps, self.overflows = state["scale"], state["good_steps"], state["overflows"]
