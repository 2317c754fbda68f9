"""AdamW beside torch.optim.AdamW (default and fused), for each way of keeping masters and moments.

Bytes a parameter that a step cannot avoid, with fp32 gradients (4, read once):

    kind              parameter        master          both moments     all
    fp32              4 + 4            -               8 + 8            28
    fp32, bf16 m v    4 + 4            -               4 + 4            20
    master            2 (written)      4 + 4           8 + 8            30
    split             2 + 2            2 + 2           8 + 8            28
    split, bf16 m v   2 + 2            2 + 2           4 + 4            20

The peers update fp32 parameters with fp32 moments: 28 bytes, whatever our kind.
"""

from __future__ import annotations

import torch

import megakern as mk
from benchmarks.common import Case, options_for, run, sizes
from megakern.kernels.torch.adamw import join_master

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

# Name: parameters' dtype, options of mk.AdamW, bytes a parameter.
KINDS = {
    "fp32": (torch.float32, {}, 28.0),
    "fp32, bf16 m v": (torch.float32, {"state_dtype": torch.bfloat16}, 20.0),
    "master": (torch.bfloat16, {"master": "fp32"}, 30.0),
    "split": (torch.bfloat16, {"master": "split"}, 28.0),
    "split, bf16 m v": (torch.bfloat16, {"master": "split", "state_dtype": torch.bfloat16}, 20.0),
}


def stepper(make, shapes, options, dtype=torch.float32):
    """A call of one step that returns the last, smallest parameter in fp32."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator).to(options.device) for s in shapes]
    parameters = [value.to(dtype).requires_grad_() for value in values]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(options.device)
    optimizer = make(parameters)
    if dtype == torch.bfloat16:
        for parameter, value in zip(parameters, values, strict=True):
            optimizer.set_master(parameter, value)

    def step(*_):
        optimizer.step()
        last = parameters[-1].detach()
        if dtype == torch.float32:
            return last
        state = optimizer.state[parameters[-1]]
        return state["master"] if "master" in state else join_master(last, state["low"])

    return step


def cases(options):
    for shape in options.shape:
        layers, C = sizes(shape)
        shapes = [s for _ in range(layers) for s in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,))]
        count = sum(torch.Size(s).numel() for s in shapes)
        for kind, (dtype, lean, work) in KINDS.items():
            contestants = {
                "megakern": stepper(lambda p, lean=lean: mk.AdamW(p, **SETTINGS, **lean), shapes, options, dtype),
                "torch": stepper(lambda p: torch.optim.AdamW(p, **SETTINGS), shapes, options),
                "torch fused": stepper(lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True), shapes, options),
            }
            label = f"{shape} ({count / 1e6:.1f} M)" if kind == "fp32" else f"{shape} {kind}"
            yield Case(label, contestants, (), work * count, "B", work * count)


if __name__ == "__main__":
    options = options_for("adamw", ["6x384", "12x768"])
    options.backward = False
    run("AdamW step, layers x width", options, cases(options))
