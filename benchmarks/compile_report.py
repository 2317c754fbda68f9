"""Compile every Triton kernel without a GPU, report what its machine code needs, hold it against a committed budget.

    python -m benchmarks.compile_report            a table: registers, spills, shared memory, tensor-core instruction
    python -m benchmarks.compile_report --check    fail when a kernel needs more than benchmarks/compile_budget.json
    python -m benchmarks.compile_report --update   write that file anew; look at the difference before committing it
    ... --only norm --arch 90                      a part; with --update of all architectures, the rest is kept

What is compiled is what the launchers launch: `compile_cases.py` calls them with meta tensors, the launches are
recorded, and each is compiled for sm_80, sm_90 and sm_100 by the ptxas in Triton's wheel. Triton caches the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import budget
from benchmarks.compile_cases import CASES
from megakern.kernels.triton.launch import Launch, recording
from megakern.kernels.triton.tile_config import Config

BUDGET = Path(__file__).with_name("compile_budget.json")
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes that one block may have
SHARED_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # each block takes 1 KB of it beyond its own
REGISTERS_OF_SM, WARPS_OF_SM, BLOCKS_OF_SM = 65536, 64, 32
TENSOR_MEMORY = 512  # columns that an SM of sm_100 has; with more, ptxas makes an empty kernel
TENSOR_CORE = re.compile(r"\b(HGMMA|UTC[A-Z]*MMA|HMMA|QGMMA|IMMA|DMMA)\b")
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Need:
    """What one kernel's machine code needs."""

    registers: int
    """A thread."""
    spill: int
    """Bytes of stack a thread; more than 0 means that registers were spilled to memory."""
    shared: int
    """Bytes a block."""
    tensor_core: str
    """The matrix instruction in the machine code, "" for none."""

    def resident(self, warps: int, arch: int) -> int:
        """Blocks of so many warps that fit a multiprocessor at once. Registers are handed out 8 a thread at a time."""
        registers = -(-self.registers // 8) * 8 * 32 * warps
        shared = SHARED_OF_SM[arch] // (self.shared + 1024)
        return min(REGISTERS_OF_SM // registers, shared, WARPS_OF_SM // warps, BLOCKS_OF_SM)


def launches(only: str | None, arch: int = 90) -> dict[str, Launch]:
    """A name for each different launch of all cases on sm_`arch`, with every configuration that it may choose. One that
    two cases share has the first one's name, also where the second is the only one asked for."""
    found: dict[str, Launch] = {}
    seen: set[tuple] = set()
    for case, call in CASES.items():
        with recording(generation=arch // 10) as recorded:
            call()
        for launch in recorded:
            source = _source(launch)
            name = f"{case} {launch.kernel.__name__.lstrip('_')} {launch.config.name}"
            what = (source.hash(), launch.config.warps, launch.config.stages)
            if what in seen:
                continue
            seen.add(what)
            while name in found:
                name += "'"
            found[name] = launch
    return {name: launch for name, launch in found.items() if only is None or only in name}


def _source(launch: Launch) -> ASTSource:
    """The recorded launch as Triton specialises it: dtypes, 1 and None as constants, divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    if missing := set(launch.kernel.arg_names) ^ set(given):
        raise TypeError(f"{launch.kernel.__name__}: arguments that do not match its signature: {sorted(missing)}")
    for index, (parameter, name) in enumerate(zip(launch.kernel.params, launch.kernel.arg_names, strict=True)):
        value = given[name]
        special = type(value) is int and not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    attributes = {index: value for index, value in attributes.items() if index not in constants}
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, arch: int) -> Need:
    """Compile one launch for sm_`arch` and read the machine code."""
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    if (columns := getattr(compiled.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY:
        raise RuntimeError(f"{launch.kernel.__name__} {launch.config} needs {columns} columns of tensor memory")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        matrix = ""
        if "tt.dot" in compiled.asm["ttir"]:
            matrix = "+".join(sorted(set(TENSOR_CORE.findall(_tool("nvdisasm", "-c", file.name)))))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return Need(registers, stack + local, compiled.metadata.shared, matrix)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


_LAUNCHES: dict[tuple[str, int], Launch] = {}


def _job(job: tuple[str, int]) -> tuple[str, int, Need]:
    name, arch = job
    return name, arch, compile_for(_LAUNCHES[job], arch)


def measure(only: str | None, architectures: tuple[int, ...]) -> dict[str, dict[str, Need]]:
    """ "sm_90" -> name -> Need, on all cores."""
    for arch in architectures:
        _LAUNCHES.update({(name, arch): launch for name, launch in launches(only, arch).items()})
    jobs = list(_LAUNCHES)
    needs: dict[str, dict[str, Need]] = {f"sm_{arch}": {} for arch in architectures}
    # fork: the children find the recorded launches, whose kernels cannot be pickled.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for done, (name, arch, need) in enumerate(pool.imap(_job, jobs, chunksize=4), 1):
            needs[f"sm_{arch}"][name] = need
            if sys.stderr.isatty():
                print(f"\r{done} of {len(jobs)} compiled", end="", file=sys.stderr)
    return needs


def config_of(arch: str, name: str) -> Config:
    """The configuration that a kernel of the report was compiled with."""
    return _LAUNCHES[name, int(arch[3:])].config


def complaints(
    needs: dict[str, dict[str, Need]], allowed: dict, partial: bool, config: Callable[[str, str], Config] = config_of
) -> list[str]:
    """Why these needs do not keep to the budget, or to what configurations say of them; empty when they do."""
    plain = {arch: {name: asdict(need) for name, need in kernels.items()} for arch, kernels in needs.items()}
    found = []
    for arch, kernels in needs.items():
        number = int(arch[3:])
        for name, need in kernels.items():
            chosen = config(arch, name)
            if need.shared > SHARED_LIMIT[number]:
                found.append(f"{arch} {name}: {need.shared} bytes of shared memory, more than a block may have")
            if need.spill and not chosen.spills:
                found.append(f"{arch} {name}: spills {need.spill} bytes, and its configuration does not say why")
            if (fit := need.resident(chosen.warps, number)) < chosen.resident:
                found.append(
                    f"{arch} {name}: {fit} programs fit a multiprocessor, its configuration needs {chosen.resident}"
                )
    return found + budget.complaints(allowed, "triton", triton.__version__, plain, partial)


def updated(needs: dict[str, dict[str, Need]], only: str | None) -> dict[str, dict[str, dict]]:
    """The whole budget with these needs; with `only`, what other cases are called keeps what the committed one says."""
    before = json.loads(BUDGET.read_text())["kernels"] if only is not None else {}
    new = {}
    for arch, kernels in needs.items():
        kept = {name: need for name, need in before.get(arch, {}).items() if only not in name}
        new[arch] = kept | {name: asdict(need) for name, need in kernels.items()}
    return new


def show(needs: dict[str, dict[str, Need]]) -> None:
    width = max((len(name) for kernels in needs.values() for name in kernels), default=0)
    for arch, kernels in needs.items():
        print(f"\n{arch:<{width}} registers  spill B  shared B  tensor core")
        for name, need in kernels.items():
            why = f"  spills: {config_of(arch, name).spills}" if need.spill else ""
            line = f"{name:<{width}}{need.registers:>10}{need.spill:>9}{need.shared:>10}  {need.tensor_core}{why}"
            print(line.rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU."
    )
    parser.add_argument("--check", action="store_true", help=f"fail on a rise against {BUDGET.name}")
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name}")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args()
    partial = options.only is not None or tuple(options.arch) != ARCHITECTURES
    if options.update and tuple(options.arch) != ARCHITECTURES:
        parser.error("--update writes what all architectures need: leave out --arch")
    needs = measure(options.only, tuple(options.arch))
    count = sum(len(kernels) for kernels in needs.values())
    return budget.outcome(
        options,
        BUDGET,
        count,
        update=lambda: budget.write(BUDGET, "triton", triton.__version__, updated(needs, options.only)),
        complaints=lambda allowed: complaints(needs, allowed, partial),
        show=lambda: show(needs),
    )


if __name__ == "__main__":
    sys.exit(main())
