"""AdamW beside torch.optim.AdamW (fused; default, compiled with --compile), for each kind of masters and moments.

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

from functools import partial

import torch

import megakern as mk
from benchmarks.common import Case, main, ours, run, sizes
from megakern.kernels.torch.adamw import join_master

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

SHAPES = {
    "cpu": ["6x384", "12x768"],
    "cuda": ["5x4096"],
    "tiny": ["1x4"],
}

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
    generator = torch.Generator(options.device).manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator, device=options.device)

    values = [random(s) for s in shapes]
    parameters = [value.to(dtype).requires_grad_() for value in values]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
        parameter.grad = random(parameter.shape)
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


def default(parameters, compiled: bool):
    optimizer = torch.optim.AdamW(parameters, **SETTINGS)
    if compiled:
        optimizer.step = torch.compile(optimizer.step)
    return optimizer


def take(step, backend):
    return step()


def case(label, shapes, kind, options):
    dtype, lean, work = KINDS[kind]
    count = sum(torch.Size(s).numel() for s in shapes)

    def our_step(backend):
        return stepper(lambda p: mk.AdamW(p, **SETTINGS, **lean, backend=backend), shapes, options, dtype)

    peers = {"torch fused": stepper(lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True), shapes, options)}
    if kind == "fp32":
        label += f" ({count / 1e6:.1f} M)"
        name = "torch.compile" if options.compile else "torch foreach"  # one of them: both do not fit beside the rest
        peers[name] = stepper(lambda p: default(p, options.compile), shapes, options)
    steps = {}
    for name, made in ours(options, "AdamW", our_step).items():
        steps[name] = partial(take, our_step(**made.keywords), **made.keywords)
    return Case(label, {**steps, **peers}, (), work * count, "B", None)


def cases(options):
    for shape in options.shape:
        layers, C = sizes(shape)
        kinds = KINDS if shape == options.shape[0] else ["fp32"]  # the others of the first size alone
        shapes = [s for _ in range(layers) for s in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,))]
        for kind in kinds:
            yield case(shape if kind == "fp32" else f"{shape} {kind}", shapes, kind, options)


def benchmark(options):
    run("AdamW step, layers x width", options, cases(options))


if __name__ == "__main__":
    main("adamw", benchmark, SHAPES)
