"""Compile the CUDA sources for every architecture, report what each kernel needs, hold it against a committed budget.

    python -m benchmarks.cuda_report            a table: registers, spills, stack, static shared memory
    python -m benchmarks.cuda_report --check    fail when a kernel needs more than benchmarks/cuda_budget.json
    python -m benchmarks.cuda_report --update   write that file anew; look at the difference before committing it
    ... --only norm                             csrc/norm.cu alone

Needs nvcc and no GPU. The figures are those of ptxas (-Xptxas -v), in the logs that csrc/build.py leaves beside its
objects. Any note C75xx fails: with those ptxas says that it made wgmma serial, or waits of its own. So does a kernel
for wgmma without HGMMA in its machine code for sm_90a, which cuobjdump shows (of the toolkit, else of Triton's wheel),
attention whose softmax waits for the product that is to run beside it, and either with a loop over lanes around a copy.
Dynamic shared memory is not here: a launch that asks for more than a block may have fails at once, under simt as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import budget
from megakern.kernels.cuda import toolkit

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("cuda_budget.json")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
NOTE = re.compile(r"^.*\bC75\d\d\b.*$", re.M)
WGMMA = {"attention_forward": "attention_forward_kernel", "attention_backward": "attention_backward_kernel",
         "linear": "product_kernel"}  # fmt: skip
"""Source -> its kernel for wgmma."""
ELECTED = {"attention_forward", "attention_backward", "linear"}
"""Sources whose copies one elected thread starts, or a step of the main loop waits for each of them: see elect_lane."""


@dataclass(frozen=True)
class Need:
    """What one kernel's machine code needs."""

    registers: int
    """A thread."""
    spill: int
    """Bytes a thread that are stored because registers ran out."""
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes a block, of static shared memory."""


def build(only: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
    """Compile what has changed for all architectures -> the folder of the objects, and the log of each source (of these
    stems), by its stem."""
    os.environ[toolkit.VARIABLE] = "all"
    spec = importlib.util.spec_from_file_location("build_csrc", ROOT / "csrc/build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    if only:
        folder = builder.compile_sources("cuda", only)
    else:
        folder = builder.build("cuda", ROOT / "megakern" / f"_C{builder.SUFFIX}")
    stems = only or [path.stem for path in builder.kernels()]
    return folder, {stem: (folder / f"{stem}.cu.o.log").read_text() for stem in stems}


def read(log: str) -> dict[str, dict[str, Need]]:
    """ "sm_90a" -> kernel's mangled name -> Need, from the output of ptxas -v."""
    found: dict[str, dict[str, Need]] = {}
    starts = list(ENTRY.finditer(log))  # none in a source without kernels
    ends = [start.start() for start in starts[1:]] + [len(log)] * bool(starts)
    for start, end in zip(starts, ends, strict=True):
        text = log[start.end() : end].split("ptxas warning")[0]
        name, arch = start.groups()
        # Functions that were not inlined follow, with spills of their own.
        spill = sum(map(int, re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads\n", text)))
        stack = re.search(r"(\d+) bytes cumulative stack size", text) or re.search(r"(\d+) bytes stack frame", text)
        registers = re.search(r"Used (\d+) registers", text).group(1)
        shared = re.search(r"(\d+) bytes smem", text)
        need = Need(int(registers), spill, int(stack.group(1)), int(shared.group(1)) if shared else 0)
        found.setdefault(arch, {})[name] = need
    return found


def demangle(names: list[str]) -> list[str]:
    """ "void megakern::f<float, 4>(megakern::P)" as "f<float, 4>"."""
    told = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = [line.removeprefix("void ").replace("megakern::", "") for line in told.splitlines()]
    return [_without_parameters(name) for name in short]


def _without_parameters(name: str) -> str:
    depth = 0
    for place, letter in enumerate(name):
        if letter == "(" and depth == 0 and not name.startswith("(anonymous", place):
            return name[:place]
        depth += (letter == "<") - (letter == ">")
    return name


def measure(logs: dict[str, str]) -> dict[str, dict[str, Need]]:
    """ "sm_90a" -> "norm forward_kernel<float, 4>" -> Need."""
    needs: dict[str, dict[str, Need]] = {f"sm_{arch}": {} for arch in toolkit.ARCHS}
    for stem, log in logs.items():
        for arch, kernels in read(log).items():
            for name, need in zip(demangle(list(kernels)), kernels.values(), strict=True):
                assert f"{stem} {name}" not in needs[arch], f"two kernels of {stem}.cu are called {name}"
                needs[arch][f"{stem} {name}"] = need
    return {arch: dict(sorted(kernels.items())) for arch, kernels in needs.items()}


def complaints(logs: dict[str, str], allowed: dict, version: str, partial: bool = False) -> list[str]:
    """Why the code of these logs may not be committed; empty when it may."""
    notes = [f"{stem}.cu: {line.strip()}" for stem, log in logs.items() for line in NOTE.findall(log)]
    plain = {arch: {name: asdict(need) for name, need in kernels.items()} for arch, kernels in measure(logs).items()}
    return notes + budget.complaints(allowed, "nvcc", version, plain, partial)


def without_wgmma(sass: str, kernel: str) -> list[str]:
    """Of the machine code of a source: the kernels of this name that do not multiply by wgmma."""
    ours = functions_of(sass, kernel)
    if not ours:
        return [f"{kernel}: not in the machine code for sm_90a"]
    slow = [name for name, text in ours.items() if "HGMMA" not in text]
    return [f"sm_90a {name}: no HGMMA in its machine code" for name in demangle(slow)] if slow else []


def functions_of(sass: str, kernel: str) -> dict[str, str]:
    """Mangled name -> machine code, of the functions with `kernel` in their names."""
    functions = re.split(r"^\s*Function : ", sass, flags=re.M)[1:]
    return {text.split()[0]: text for text in functions if kernel in text.split()[0]}


def exponentials(name: str) -> int:
    """Of an attention kernel with this mangled name: how many of a thread are to run between the wait for the scores
    and that for the product beside them. 0: those of large head dims wait for both at once, for registers."""
    if tile := re.search(r"AttentionTileILi(\d+)ELi\d+ELi(\d+)EEELb(\d)E", name):
        depth, keys, featured = map(int, tile.groups())
        return 0 if featured and depth > 128 else keys // 2
    depth, queries, featured = map(int, re.search(r"Li(\d+)ELi(\d+)ELb(\d)E", name).groups())
    return 0 if depth > (64 if featured else 128) else 32 if queries % 64 == 0 else queries // 2


def without_overlap(sass: str, kernel: str) -> list[str]:
    """Attention kernels that wait for the product beside the softmax (forward: with v; backward: of dout and v) before
    its exponentials: ptxas has moved a wait. (It once had, in all forward kernels for plain scores.)"""
    found = {}
    for name, text in functions_of(sass, kernel).items():
        wanted = exponentials(name)
        parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", text)[1:]
        if kernel == WGMMA["attention_backward"]:
            parts = parts[:1]  # the others are waits for sums
        beside = [part.split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0].count("MUFU.EX2") for part in parts]
        if min(beside, default=0) < wanted:
            found[name] = f"{min(beside, default=0)} of {wanted} exponentials of a thread run beside the product"
    names = demangle(list(found)) if found else []
    return [f"sm_90a {name}: {told}" for name, told in zip(names, found.values(), strict=True)]


def with_loops_over_lanes(sass: str) -> list[str]:
    """The kernels of a source in which the compiler wrote a loop over the lanes of a warp, around a copy by TMA."""
    slow = [name for name, text in functions_of(sass, "").items() if "BRA.U.ANY" in text]
    return [f"sm_90a {name}: a loop over lanes around a copy" for name in demangle(slow)] if slow else []


def machine_code(folder: Path, stems: Iterable[str], nvcc: Path) -> list[str]:
    """Complaints about the machine code of those sources that have kernels for wgmma."""
    wanted = [stem for stem in stems if stem in WGMMA]
    tool = nvcc.with_name("cuobjdump")
    if not tool.exists():
        found = importlib.util.find_spec("triton")
        if found is None:
            return ["there is no cuobjdump to show machine code, beside nvcc or in Triton's wheel: pip install triton"]
        tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    complaints = []
    for stem in wanted:
        command = [tool, "-sass", "-arch", "sm_90a", folder / f"{stem}.cu.o"]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lacks = without_wgmma(sass, WGMMA[stem]) + (without_overlap(sass, WGMMA[stem]) if stem != "linear" else [])
        lacks += with_loops_over_lanes(sass) if stem in ELECTED else []
        complaints += [f"{stem}.cu: {line}" for line in lacks]
    return complaints


def updated(needs: dict[str, dict[str, Need]], only: tuple[str, ...]) -> budget.Needs:
    """The whole budget with these needs; with `only`, other sources keep what the committed one says."""
    before = json.loads(BUDGET.read_text())["kernels"] if only else {}
    new = {}
    for arch, kernels in needs.items():
        kept = {name: need for name, need in before.get(arch, {}).items() if name.split()[0] not in only}
        new[arch] = dict(sorted({**kept, **{name: asdict(need) for name, need in kernels.items()}}.items()))
    return new


def show(needs: dict[str, dict[str, Need]]) -> None:
    width = max((len(name) for kernels in needs.values() for name in kernels), default=0)
    for arch, kernels in needs.items():
        print(f"\n{arch:<{width}} registers  spill B  stack B  shared B")
        for name, need in kernels.items():
            print(f"{name:<{width}}{need.registers:>10}{need.spill:>9}{need.stack:>9}{need.shared:>10}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA sources without a GPU.")
    parser.add_argument("--check", action="store_true", help=f"fail on a rise against {BUDGET.name}")
    parser.add_argument("--update", action="store_true", help=f"write {BUDGET.name}")
    parser.add_argument("--only", nargs="+", metavar="STEM", default=(), help="these csrc/STEM.cu, compiled alone")
    options = parser.parse_args()
    nvcc = toolkit.find_nvcc()
    if nvcc is None:
        parser.error(toolkit.no_nvcc())
    only = tuple(options.only)
    (folder, logs), version = build(only), toolkit.release(nvcc)
    needs = measure(logs)
    count = sum(len(kernels) for kernels in needs.values())
    return budget.outcome(
        options,
        BUDGET,
        count,
        update=lambda: budget.write(BUDGET, "nvcc", version, updated(needs, only)),
        complaints=lambda allowed: (
            complaints(logs, allowed, version, partial=bool(only)) + machine_code(folder, logs, nvcc)
        ),
        show=lambda: show(needs),
    )


if __name__ == "__main__":
    sys.exit(main())
