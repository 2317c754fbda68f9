"""`megakern doctor`: what this machine and installation can do, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from megakern import __version__
from megakern.kernels import cuda
from megakern.kernels.torch import native
from megakern.ops.dispatch import UNAVAILABLE
from megakern.parallel import shared
from megakern.parallel.overlap import why_not_fused
from megakern.train import machine
from megakern.train.metrics import quantity
from megakern.train.plot import have_matplotlib

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "tqdm", "dacite", "jinja2", "matplotlib", "fastapi",
    "uvicorn", "transformers", "lm-eval",
)  # fmt: skip


def report() -> str:
    """Versions, devices with measured rates, backends, and what is missing with the way out."""
    lines = [f"megakern {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    lines += [f"  {name:<14}{_version(name)}" for name in PACKAGES]
    lines += ["", "devices", *(f"  {line}" for line in _devices())]
    lines += ["", "backends"]
    lines += [f"  {name:<14}{'usable' if reason is None else 'no: ' + reason}" for name, reason in UNAVAILABLE.items()]
    lines.append(f"  {'torch on CPUs':<14}{native.describe()}")
    if UNAVAILABLE["cuda"] != cuda.describe():  # which has the reason
        lines.append(f"  {'CUDA kernels':<14}{cuda.describe()}")
    lines += ["", "other"]
    distributed = "gloo" + (", nccl" if torch.distributed.is_nccl_available() else "")
    lines.append(f"  {'collectives':<14}{distributed}")
    reason = shared.why_not()
    lines.append(f"  {'shared memory':<14}{'between CPU ranks of one machine' if reason is None else 'no: ' + reason}")
    fused = why_not_fused(machine.device_type(), max(2, torch.cuda.device_count()))
    lines.append(f"  {'fused tp':<14}{'symmetric memory' if fused is None else 'no: ' + fused}")
    plots = "yes" if have_matplotlib() else "no: install matplotlib with: pip install 'megakern[plot]'"
    lines.append(f"  {'plots':<14}{plots}")
    lines.append(f"  {'threads':<14}{torch.get_num_threads()} of {machine.cores()} cores; OMP_NUM_THREADS="
                 f"{os.environ.get('OMP_NUM_THREADS', 'not set')}")  # fmt: skip
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cpu = torch.device("cpu")
    features = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if _capability(name)]
    rates = ", ".join(
        f"{name} {quantity(machine.matmul_rate(dtype, cpu), 'FLOP/s')}" for name, dtype in machine.DTYPES.items()
    )
    lines = [f"cpu: {machine.cores()} cores, {', '.join(features) or 'no AVX2'}; matmul {rates}"]
    precision, reason = machine.choose_precision(cpu)
    lines.append(f"     precision auto = {precision}: {reason}")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "is built without CUDA" if built is None else f"is built for CUDA {built}, but no GPU answers"
        lines.append(f"gpu: none; this PyTorch {why}")
        return lines
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu {index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _capability(name: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(name, False))
