"""clip_grad_norm_ (measuring only) beside torch.nn.utils.clip_grad_norm_. Bytes: 4 a parameter, read once; fp32."""

from __future__ import annotations

import torch

import megakern as mk
from benchmarks.common import Case, options_for, run, sizes


def cases(options):
    for shape in options.shape:
        layers, C = sizes(shape)
        shapes = [s for _ in range(layers) for s in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,))]
        parameters = [torch.zeros(s, device=options.device).requires_grad_() for s in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, device=options.device)
        contestants = {
            "megakern": lambda p=parameters: mk.clip_grad_norm_(p, float("inf")),
            "torch": lambda p=parameters: torch.nn.utils.clip_grad_norm_(p, float("inf")),
        }
        count = sum(parameter.numel() for parameter in parameters)
        yield Case(f"{shape} ({count / 1e6:.1f} M)", contestants, (), 4.0 * count, "B", 4.0 * count)


if __name__ == "__main__":
    options = options_for("grad_norm", ["6x384", "12x768"])
    options.backward = False
    run("clip_grad_norm_, layers x width", options, cases(options))
