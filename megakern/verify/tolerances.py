"""How far a run may be from the reference (one process, fp32, `torch` backend), as data.

    loss       largest relative difference of a step's loss
    gradient   relative L2 distance of all gradients of step 1; also bounds the gradient norm of each step
    parameter  the same for one parameter, the worst (see `worker.Distance`)
    update     distance of the weights after the last step, relative to how far the reference moved

In fp32 layouts differ from the reference only in the order of sums: FP32 bounds them. In bf16 and fp16 the rounding of
each operation is far larger, and one process has it too: a layout may be at most twice as far from the fp32 reference
as one process in the same precision is, plus FLOOR, where the distance of the one process happens to be small. That
process itself must keep to ALONE.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measures:
    """One number for each thing that is compared: distances, or the bounds on them."""

    loss: float
    gradient: float
    parameter: float
    update: float


# Measured over 5 steps of tiny-gpt2 and tiny-llama, tp 2 with and without sequence parallelism, on a CPU. fp32: loss
# 9e-8, gradient 2e-7, parameter 6e-7, update 5e-6; the bounds leave room for the longer sums of kernels and GPUs.
FP32 = Measures(loss=1e-5, gradient=1e-4, parameter=1e-3, update=1e-2)
# bf16, one process: loss 2e-5, gradient 6e-3, parameter 2e-2, update 5e-2. fp16 has 3 more bits.
ALONE = {
    "bf16": Measures(loss=5e-3, gradient=5e-2, parameter=0.3, update=0.5),
    "fp16": Measures(loss=1e-3, gradient=1e-2, parameter=0.1, update=0.2),
}
FLOOR = {
    "bf16": Measures(loss=2e-4, gradient=5e-3, parameter=2e-2, update=2e-2),
    "fp16": Measures(loss=5e-5, gradient=1e-3, parameter=5e-3, update=1e-2),
}


def bound_of(precision: str, alone: Measures | None) -> Measures:
    """The bound on a run in `precision`; `alone`: one process in it, None where the run is that process itself."""
    if precision == "fp32":
        return FP32
    if alone is None:
        return ALONE[precision]
    floor = vars(FLOOR[precision])
    return Measures(**{name: 2 * value + floor[name] for name, value in vars(alone).items()})
