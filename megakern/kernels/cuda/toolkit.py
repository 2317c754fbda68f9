"""Finding CUDA's compiler, and whether to build `megakern._C` with it. setup.py and `megakern doctor` both ask here.

Standard library alone: setup.py loads this file by its path, before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ARCHS = ("80", "90a", "100")  # A100 and later of its family, H100 / H200, B200; PTX of the last serves what comes later
VARIABLE = "MEGAKERN_CUDA_ARCHS"
USUAL = Path("/usr/local/cuda/bin/nvcc")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, of /usr/local/cuda or of the wheel nvidia-cuda-nvcc, in this order."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return _there(Path(home) / "bin" / "nvcc")  # a wrong CUDA_HOME is not mended by another toolkit
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    packages = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")} | set(sys.path)
    wheels = [nvcc for folder in sorted(packages) for nvcc in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next(filter(_there, [USUAL, *wheels]), None)


def _there(path: Path) -> Path | None:
    return path if os.access(path, os.X_OK) else None


def release(nvcc: Path) -> str:
    """ "13.0" and the like."""
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", told).group(1)


def gpu_present() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def archs() -> tuple[str, ...] | None:
    """The architectures that MEGAKERN_CUDA_ARCHS asks for; () for "none", None when it is not set.

    Raises ValueError: not a list like "80,90a".
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if not asked:
        return None
    if asked in ("all", "none"):
        return ARCHS if asked == "all" else ()
    listed = tuple(asked.replace(",", " ").split())
    wrong = [arch for arch in listed if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong:
        raise ValueError(f"{VARIABLE} must be all, none or a list like 80,90a,100, got {asked!r}")
    return listed


def why_not() -> str | None:
    """Why an installation on this machine leaves `megakern._C` out, or None when it builds it."""
    asked = archs()
    if asked == ():
        return f"{VARIABLE} is none"
    if find_nvcc() is None:
        return no_nvcc()
    if asked is None and not gpu_present():
        return f"this machine has no NVIDIA GPU ({VARIABLE}=all builds it all the same)"
    return None


def no_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    where = f"in CUDA_HOME={home}" if home else "on the PATH, in /usr/local/cuda or as a wheel"
    wheels = "nvidia-cuda-nvcc, nvidia-cuda-runtime and nvidia-cuda-cccl"
    return f"there is no nvcc {where}; install CUDA's toolkit or the wheels {wheels}, then megakern"


def how_to_build() -> str:
    """Why `megakern._C` may not be there, or the way to it, for `megakern doctor`."""
    return why_not() or "install megakern again (pip install -v shows why a build fails)"


def unsuited(built: str, capability: tuple[int, int]) -> str | None:
    """Why code for the architectures named in `built` ("... sm_80, sm_90a") does not run on this GPU, or None."""
    major, minor = capability
    if capability < (8, 0):
        return f"CUDA kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    for number, only_there in re.findall(r"sm_(\d+)([af]?)", built):
        its_major, its_minor = divmod(int(number), 10)
        portable = not only_there and (its_major, its_minor) <= capability  # by its PTX, or of one family
        if portable or (its_major, its_minor) == capability:
            return None
    own = arch_of(capability)
    return f"megakern._C was built {built}, this GPU is sm_{major}{minor}; {VARIABLE}={own} builds it for that"


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for this GPU alone: "90a" where kernels use what only Hopper has."""
    return "{}{}".format(*capability) + ("a" if capability == (9, 0) else "")


def gencode(listed: tuple[str, ...]) -> list[str]:
    """nvcc's flags for machine code of these architectures, and PTX of the last that later GPUs can run."""
    portable = [arch for arch in listed if arch.isdigit()]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in listed]
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable[-1:]]
