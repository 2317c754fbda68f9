"""The `triton` backend: kernels for NVIDIA GPUs from sm_80 on, and for CPU tensors in Triton's interpreter.

Set TRITON_INTERPRET=1 before Triton is imported to run every kernel on CPU tensors, slowly, in Python: that is how the
tests run without a GPU. This module must not import triton: it says why Triton cannot be used.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from megakern.kernels.constant import constant_result
from megakern.kernels.triton import configs, tune
from megakern.kernels.triton.tile_config import Choice, Config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)
OPS = tuple(configs.OPS)
TRACEABLE = not INTERPRETED  # the interpreter's functions are not kernels that a compiler can take


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with: pip install 'megakern[gpu]'"
    if not INTERPRETED and not torch.cuda.is_available():
        return "it needs an NVIDIA GPU (or TRITON_INTERPRET=1, which runs the kernels on CPU tensors in Python)"
    return None


def supports(problem) -> str | None:
    if problem.op not in configs.OPS:
        return "there is no Triton kernel for this op in this version"
    if problem.dtype not in DTYPES:
        return f"Triton kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if problem.device not in ("cpu", "cuda"):
        return f"Triton kernels run on NVIDIA GPUs, not on {problem.device!r} tensors"
    if problem.device == "cpu" and not INTERPRETED:
        return "Triton kernels take CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    too_old = None if INTERPRETED else _too_old()
    return too_old or configs.OPS[problem.op].refusal(problem)


def configuration(problem) -> str:
    """The named tile configurations that this problem gets, for `mk.explain`."""
    parts = []
    for role, choice in configs.OPS[problem.op].choices(problem).items():
        if isinstance(choice, Config):
            choice = Choice((choice,))
        config, source = tune.told(choice)
        tiles = " ".join(f"{name}={size}" for name, size in config.tiles.items())
        how = f"{tiles}, {config.warps} warps, {config.stages} stages: {source or config.why}"
        parts.append(f"{role} {config.name!r} ({how})")
    return "; ".join(parts)


@constant_result
def _too_old() -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"Triton kernels need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None
