"""Build script: the optional C++ kernels. Metadata is in pyproject.toml.

An extension that cannot be built (no compiler, no Python headers) is left out with a notice, and the package works
without it. pip shows the notice with -v; `megakern doctor` says at any time what is there.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def cpu_extension() -> Extension:
    """megakern._cpu: kernels for CPUs. Each file chooses its own instruction sets, so there is no -march here."""
    import pybind11

    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms of g++ 12 in its own avx512fintrin.h
    return Extension(
        "megakern._cpu",
        sources,
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *quiet, *openmp],
        extra_link_args=openmp,
        language="c++",
        optional=True,
    )


class BuildExtensions(build_ext):
    """Builds what it can, several files at a time, and says aloud what it could not."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            notice(ext.name, f"{type(error).__name__}: {error}")
            raise  # setuptools goes on, since the extension is optional


def notice(name: str, reason: str) -> None:
    line = "!" * 100
    print(
        f"{line}\n{name} was NOT built: {reason}\n"
        f"megakern works without it, more slowly. To build it, install g++ and the Python headers, then\n"
        f"install megakern again.\n{line}",
        file=sys.stderr,
        flush=True,
    )


def extensions() -> list[Extension]:
    try:
        return [cpu_extension()]
    except ImportError as error:
        notice("megakern._cpu", f"{error}; install pybind11")
        return []


os.chdir(Path(__file__).resolve().parent)
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
