"""AdamW beside torch.optim.AdamW (default and fused). Bytes: 28 a parameter (read p, g, m, v; write p, m, v; fp32)."""

from __future__ import annotations

import torch

import megakern as mk
from benchmarks.common import Case, options_for, run, sizes

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def stepper(make, shapes, options):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(s, generator=generator).to(options.device).requires_grad_() for s in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(options.device)
    optimizer = make(parameters)

    def step(*_):
        optimizer.step()
        return parameters[0].detach()

    return step


def cases(options):
    for shape in options.shape:
        layers, C = sizes(shape)
        shapes = [s for _ in range(layers) for s in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,))]
        contestants = {
            "megakern": stepper(lambda p: mk.AdamW(p, **SETTINGS), shapes, options),
            "torch": stepper(lambda p: torch.optim.AdamW(p, **SETTINGS), shapes, options),
            "torch fused": stepper(lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True), shapes, options),
        }
        count = sum(torch.Size(s).numel() for s in shapes)
        yield Case(f"{shape} ({count / 1e6:.1f} M)", contestants, (), 28.0 * count, "B", 28.0 * count)


if __name__ == "__main__":
    options = options_for("adamw", ["6x384", "12x768"])
    options.backward = False
    run("AdamW step, layers x width", options, cases(options))
