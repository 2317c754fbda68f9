"""Compiles megakern._C (CUDA, for GPUs) and megakern._simt (the same sources for CPU tensors, for tests) with ninja.

    python csrc/build.py simt        in place, what has changed since the last time
    python csrc/build.py cuda        MEGAKERN_CUDA_ARCHS=90a: for H100 and H200 alone, a third of the time

Needs pybind11, ninja and a C++ compiler, for `cuda` also nvcc; no setuptools, and neither torch nor a GPU. Objects,
logs of ptxas and build.ninja lie in build/csrc/. setup.py calls `build` for what an installation includes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NAMES = {"cuda": "_C", "simt": "_simt"}
BUDGETED_NVCC = "13.0"  # of benchmarks/cuda_budget.json: with it a spilled register is an error, with others a warning

spec = importlib.util.spec_from_file_location("toolkit", ROOT / "megakern/kernels/cuda/toolkit.py")
toolkit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toolkit)

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
CXX_FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}"]


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def find_ninja() -> str:
    on_path = shutil.which("ninja")
    if on_path:
        return on_path
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_file(name: str, built: str, variables: dict[str, str], jobs: list[tuple[str, list[Path], list[str]]]) -> str:
    """The shared library `name` from bindings.cpp and `jobs`: a rule, sources, and their flags."""
    variables = {"module": name, "cxx": compiler(), **variables}
    lines = [f"{key} = {value}" for key, value in variables.items()] + [RULES]
    macros = [f"-DMEGAKERN_MODULE={name}", f"-DMEGAKERN_BUILT='\"{built}\"'"]
    macros += ["-DMEGAKERN_SIMT"] if name == NAMES["simt"] else []
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    objects = []
    for rule, sources, flags in [("cxx", [CSRC / "bindings.cpp"], [*CXX_FLAGS, *python, *macros]), *jobs]:
        for source in sources:
            objects.append(f"{source.relative_to(CSRC)}.o")
            lines.append(f"build {objects[-1]}: {rule} {escaped(source)}\n  flags = {' '.join(flags)}")
    lines.append(f"build {name}{SUFFIX}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def kernels() -> list[Path]:
    return sorted(CSRC.glob("*.cu"))


def simt() -> str:
    flags = [*CXX_FLAGS, "-DMEGAKERN_SIMT", "-pthread"]
    quiet = ["-Wno-unknown-pragmas", "-Wno-psabi"]  # "#pragma unroll"; a note of GCC 4.6 about 64-byte alignment
    emulator = sorted((CSRC / "simt").glob("*.cpp"))
    jobs = [("cxx", kernels(), [*flags, *quiet, "-x", "c++"]), ("cxx", emulator, [*flags, "-O3"])]
    return ninja_file("_simt", "by a C++ compiler, for CPU tensors", {"linker": f"{compiler()} -shared -pthread"}, jobs)


def cuda() -> str:
    nvcc = toolkit.find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(toolkit.no_nvcc())
    archs = toolkit.archs() or toolkit.ARCHS
    release = toolkit.release(nvcc)
    strict = ["-Xptxas=-Werror"] if release == BUDGETED_NVCC else []
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v,-warn-spills", *strict]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *toolkit.gencode(archs)]
    libraries = " ".join(f"-L{nvcc.resolve().parent.parent / folder}" for folder in ("lib64", "lib"))
    linker = f"{nvcc} -shared -cudart=static {libraries} -Xlinker=--exclude-libs,ALL"
    built = f"by nvcc {release} for {', '.join(f'sm_{arch}' for arch in archs)}"
    return ninja_file("_C", built, {"nvcc": str(nvcc), "linker": linker}, [("nvcc", kernels(), flags)])


def compile_sources(which: str, stems: tuple[str, ...] = ()) -> Path:
    """Compile what changed of "cuda" or "simt", or of these csrc/<stem>.cu alone -> the folder of the results."""
    folder = ROOT / "build" / "csrc" / (NAMES[which] + SUFFIX.removesuffix(".so"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text({"cuda": cuda, "simt": simt}[which]())
    objects = [f"{stem}.cu.o" for stem in stems]
    subprocess.run([find_ninja(), "-C", folder, f"-j{os.cpu_count()}", *objects], check=True)
    return folder


def build(which: str, target: Path) -> Path:
    """Compile "cuda" or "simt" and put the module at `target`. Raises what its tools raise. -> as compile_sources."""
    folder = compile_sources(which)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    shutil.copy(folder / (NAMES[which] + SUFFIX), fresh)
    fresh.replace(target)  # a process that has the old one loaded keeps it
    return folder


def main() -> int:
    asked = sys.argv[1:]
    if not asked or set(asked) - set(NAMES):
        print(f"usage: python csrc/build.py {' | '.join(NAMES)} ...", file=sys.stderr)
        return 2
    for which in asked:
        try:
            build(which, ROOT / "megakern" / (NAMES[which] + SUFFIX))
        except (FileNotFoundError, ValueError) as error:
            print(f"megakern.{NAMES[which]}: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError:
            return 1  # ninja has said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
