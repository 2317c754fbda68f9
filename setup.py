"""Build script: the optional compiled modules. Metadata is in pyproject.toml.

    megakern._cpu    C++ kernels for CPUs                         where there is a C++ compiler
    megakern._C      CUDA kernels                                 where there are nvcc and a GPU, or MEGAKERN_CUDA_ARCHS
    megakern._simt   the CUDA kernels on CPU tensors, for tests   by the next command alone

    python setup.py build_ext --inplace --modules cpu,simt,cuda    builds those named, and fails when it cannot

A module that cannot be built is left out of an installation with a notice, and the package works without it. pip shows
the notice with -v; `megakern doctor` says at any time what is there, and why not the rest. The sources of `_C` and
`_simt` are the same; ninja compiles what has changed, in build/csrc/. No module knows torch: one build serves all its
versions.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODULES = {"cpu": "megakern._cpu", "cuda": "megakern._C", "simt": "megakern._simt"}
BUDGETED_NVCC = "13.0"  # of benchmarks/cuda_budget.json: with it a spilled register is an error, with others a warning


def load_toolkit():
    path = ROOT / "megakern/kernels/cuda/toolkit.py"
    spec = importlib.util.spec_from_file_location("toolkit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit = load_toolkit()


def cpu_extension() -> Extension:
    """Kernels for CPUs. Each file chooses its own instruction sets, so there is no -march here."""
    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms of g++ 12 in its own avx512fintrin.h
    return Extension(
        MODULES["cpu"],
        sources,
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        include_dirs=[pybind11_headers()],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *quiet, *openmp],
        extra_link_args=openmp,
        language="c++",
    )


def pybind11_headers() -> str:
    import pybind11

    return pybind11.get_include()


# --- _C and _simt: a build.ninja each ---

RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  description = $module $in
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out >$out.log 2>&1 || { cat $out.log; exit 1; }
  description = $module $in
  depfile = $out.d
  deps = gcc
rule link
  command = $linker $in -o $out
  description = $module $out
"""


def ninja_file(module: str, built: str, variables: dict[str, str], rule: str, flags: dict[str, list[str]]) -> str:
    """Objects of bindings.cpp, csrc/*.cu by `rule`, and for `_simt` csrc/simt/*.cpp; one shared library of them."""
    variables = {"module": module, "cxx": compiler(), **variables}
    lines = [f"{name} = {value}" for name, value in variables.items()] + [RULES]
    include = [f"-I{ROOT}/csrc", f"-isystem{pybind11_headers()}", f"-isystem{sysconfig.get_path('include')}"]
    macros = [f"-DMEGAKERN_MODULE={module}", f"-DMEGAKERN_BUILT='\"{built}\"'", *flags.get("macros", [])]
    common = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    objects = []

    def compile_with(rule: str, sources: list[Path], flags: list[str]) -> None:
        for source in sources:
            name = f"{source.relative_to(ROOT / 'csrc')}.o"
            lines.append(f"build {name}: {rule} {escaped(source)}\n  flags = {' '.join(flags)}")
            objects.append(name)

    compile_with("cxx", [ROOT / "csrc/bindings.cpp"], [*common, *include, *macros])
    compile_with(rule, sorted((ROOT / "csrc").glob("*.cu")), [f"-I{ROOT}/csrc", *flags["kernels"]])
    if "emulator" in flags:
        compile_with("cxx", sorted((ROOT / "csrc/simt").glob("*.cpp")), [*common, f"-I{ROOT}/csrc", *flags["emulator"]])
    lines.append(f"build {module}{sysconfig.get_config_var('EXT_SUFFIX')}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def simt_ninja() -> str:
    kernels = [
        "-std=c++17",
        "-O2",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    flags = {
        "macros": ["-DMEGAKERN_SIMT"],
        "kernels": [*kernels, "-DMEGAKERN_SIMT", "-x", "c++"],
        "emulator": ["-O3", "-DMEGAKERN_SIMT", "-pthread"],
    }
    linker = {"linker": f"{compiler()} -shared -pthread"}
    return ninja_file("_simt", "by a C++ compiler, for CPU tensors", linker, "cxx", flags)


def cuda_ninja() -> str:
    nvcc = toolkit.find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(toolkit.no_nvcc())
    archs = toolkit.archs() or toolkit.ARCHS
    release = toolkit.release(nvcc)
    strict = ["-Xptxas=-Werror"] if release == BUDGETED_NVCC else []
    flags = ["-std=c++17", "-O3", "-Xptxas=-v,-warn-spills", *strict, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
    libraries = " ".join(f"-L{nvcc.resolve().parent.parent / name}" for name in ("lib64", "lib"))
    linker = f"{nvcc} -shared -cudart=static {libraries} -Xlinker=--exclude-libs,ALL"
    built = f"by nvcc {release} for {', '.join(f'sm_{arch}' for arch in archs)}"
    return ninja_file(
        "_C", built, {"nvcc": str(nvcc), "linker": linker}, "nvcc", {"kernels": [*flags, *toolkit.gencode(archs)]}
    )


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def find_ninja() -> str:
    on_path = shutil.which("ninja")
    if on_path:
        return on_path
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


# --- commands ---


class BuildExtensions(build_ext):
    """Builds what it can, several files at a time, and says aloud what it could not."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("modules=", None, f"build these, or fail: {','.join(MODULES)}"),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.modules = None

    def finalize_options(self):
        super().finalize_options()
        asked = self.modules.split(",") if self.modules else []
        if asked and self.inplace:
            self.build_lib = str(Path(self.build_temp) / "inplace")  # what lies in build/lib gets into the next wheel
        if unknown := set(asked) - set(MODULES):
            raise SystemExit(f"--modules must be some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
        left_out = toolkit.why_not()
        if not asked and left_out is not None:
            print(f"{MODULES['cuda']} is left out: {left_out}", file=sys.stderr)
        names = asked or ["cpu", *(["cuda"] if left_out is None else [])]
        self.extensions = [extension for extension in self.extensions if extension.name in map(MODULES.get, names)]
        for extension in self.extensions:
            extension.optional = not asked or shutil.which(compiler()) is None

    def build_extension(self, ext):
        try:
            if ext.name == MODULES["cpu"]:
                super().build_extension(ext)
            else:
                self.build_with_ninja(ext)
        except Exception as error:
            if ext.optional:
                notice(ext.name, f"{type(error).__name__}: {error}")
            raise CompileError(f"{ext.name}: {error}") from error  # setuptools goes on where the extension is optional

    def build_with_ninja(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        folder = ROOT / "build" / "csrc" / target.name.split(".so")[0]
        folder.mkdir(parents=True, exist_ok=True)
        text = simt_ninja() if ext.name == MODULES["simt"] else cuda_ninja()
        (folder / "build.ninja").write_text(text)
        subprocess.run([find_ninja(), "-C", folder, f"-j{os.cpu_count()}"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / target.name, target)


def notice(name: str, reason: str) -> None:
    line = "!" * 100
    print(
        f"{line}\n{name} was NOT built: {reason}\n"
        f"megakern works without it, more slowly. To build it, install a C++ compiler and the Python headers (for\n"
        f"megakern._C also CUDA's nvcc), then install megakern again.\n{line}",
        file=sys.stderr,
        flush=True,
    )


def extensions() -> list[Extension]:
    try:
        return [cpu_extension(), Extension(MODULES["cuda"], []), Extension(MODULES["simt"], [])]
    except ImportError as error:
        notice("megakern._cpu", f"{error}; install pybind11")
        return []


os.chdir(ROOT)
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
