"""clip_grad_norm_ (measuring only) beside torch.nn.utils.clip_grad_norm_. Bytes: 4 a parameter, read once; fp32."""

from __future__ import annotations

import torch

import megakern as mk
from benchmarks.common import Case, main, ours, run, sizes

SHAPES = {
    "cpu": ["6x384", "12x768"],
    "cuda": ["5x4096"],
    "tiny": ["1x4"],
}


def cases(options):
    for shape in options.shape:
        layers, C = sizes(shape)
        shapes = [s for _ in range(layers) for s in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,))]
        parameters = [torch.empty(s, device=options.device).requires_grad_() for s in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, device=options.device)
        call = lambda backend, p=parameters: mk.clip_grad_norm_(p, float("inf"), backend=backend)  # noqa: E731
        contestants = {
            **ours(options, "clip_grad_norm_", call),
            "torch foreach": lambda p=parameters: torch.nn.utils.clip_grad_norm_(p, float("inf")),
        }
        count = sum(parameter.numel() for parameter in parameters)
        yield Case(f"{shape} ({count / 1e6:.1f} M)", contestants, (), 4.0 * count, "B", None)


def benchmark(options):
    run("clip_grad_norm_, layers x width", options, cases(options))


if __name__ == "__main__":
    main("grad_norm", benchmark, SHAPES)
