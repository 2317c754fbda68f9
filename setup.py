"""Build script: the optional compiled modules. Metadata is in pyproject.toml.

    megakern._cpu    C++ kernels for CPUs      where there is a C++ compiler
    megakern._C      CUDA kernels              where there are nvcc and a GPU, or MEGAKERN_CUDA_ARCHS asks for it

A module that cannot be built is left out with a notice, and the package works without it. pip shows the notice with -v;
`megakern doctor` says at any time what is there, and why not the rest. csrc/build.py builds `_C` in place, for work on
it, and `_simt`, the same kernels for tests without a GPU. No module knows torch: one build serves all its versions.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "megakern._cpu", "megakern._C"


def load_builder():
    """csrc/build.py, whose imports are those of the build system's requirements."""
    spec = importlib.util.spec_from_file_location("build_csrc", ROOT / "csrc/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpu_extension() -> Extension:
    """Kernels for CPUs. Each file chooses its own instruction sets, so there is no -march here."""
    import pybind11

    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms of g++ 12 in its own avx512fintrin.h
    return Extension(
        CPU,
        sources,
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *quiet, *openmp],
        extra_link_args=openmp,
        language="c++",
        optional=True,
    )


class BuildPackage(build_py):
    """The package, and in a wheel what `megakern bench` runs (megakern/bench.py says why it is put there)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source in [*Path("benchmarks").glob("*.py"), *Path("benchmarks/peers").glob("*.py")]:
                target = Path(self.build_lib, "megakern/_suite", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


class BuildExtensions(build_ext):
    """Builds what it can, several files at a time, and says aloud what it could not."""

    def build_extension(self, ext):
        try:
            if ext.name == CPU:
                super().build_extension(ext)
            else:
                load_builder().build("cuda", Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:
            notice(ext.name, f"{type(error).__name__}: {error}")
            raise CompileError(str(error)) from error  # setuptools goes on, since the extension is optional


def notice(name: str, reason: str) -> None:
    line = "!" * 100
    print(
        f"{line}\n{name} was NOT built: {reason}\n"
        f"megakern works without it, more slowly. To build it, install a C++ compiler and the Python headers (for\n"
        f"{CUDA} also CUDA's nvcc), then install megakern again.\n{line}",
        file=sys.stderr,
        flush=True,
    )


def extensions() -> list[Extension]:
    try:
        found = [cpu_extension()]
        toolkit = load_builder().toolkit
        left_out = toolkit.why_not()
    except ImportError as error:
        notice(CPU, f"{error}; install pybind11")
        return []
    if left_out is not None:
        print(f"{CUDA} is left out: {left_out}", file=sys.stderr)
        return found
    return [*found, Extension(CUDA, [], optional=toolkit.archs() is None)]  # asked for by name, it must succeed


os.chdir(ROOT)
setup(ext_modules=extensions(), cmdclass={"build_py": BuildPackage, "build_ext": BuildExtensions})
