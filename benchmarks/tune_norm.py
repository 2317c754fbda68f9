"""The C++ norms with other threads, rows and blocks, timed on a GPU: for the table in megakern/kernels/cuda/configs.py.

    python -m benchmarks.tune_norm [--shape 8192x8192 ...] [--dtype bf16] [--json FILE]

Per cent of the copy rate, at 2 passes over x forward, 3 backward, 4 with a residual (layer_norm has none here, rms_norm
has one). The launchers are called, so that the sums of weight gradients count.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import describe_machine, machine_facts, sizes
from benchmarks.timing import CudaClock
from megakern.kernels.cuda import configs
from megakern.kernels.cuda.norm import norm_backward, norm_forward
from megakern.train.machine import DTYPES

SHAPES = ["8192x8192", "16384x4096", "4096x16384", "2048x65536", "65536x1024", "524288x128"]


WAYS = {  # name -> the vectors of a row in one block, and of them a thread's
    "2 vectors": [(512, 2)],
    "4 vectors": [(4096, 4)],
    "8 vectors": [(8192, 8)],
    "8 from 1024 on": [(64, 2), (512, 4), (8192, 8)],
    "clusters from 2048 on": [(64, 2), (2048, 4)],
    "clusters from 1024 on": [(64, 2), (1024, 4)],
}
CHANGES = {
    "forward": [{"ways": name} for name in WAYS] + [{"threads": threads} for threads in (128, 512)],
    "backward": [
        *({"threads": t, "ways": (2048, steps)} for t in (128, 256, 512) for steps in (1, 2, 4)),
        *({"threads": t, "ways": (2048, steps), "stages": n} for t in (256, 512) for steps in (2, 4) for n in (3, 4)),
        {"stages": 2}, {"ways": (1024, 4)}, {"ways": (512, 4)}, {"ways": (512, 4), "stages": 3},
        *({"clusters": c} for c in ((132, 66, 32, 16), (132, 64, 31, 15), (264, 132, 64, 32))),
    ],
}  # fmt: skip


def rule_name(direction: str, residual: bool) -> str:
    return "FORWARD_RESIDUAL" if direction == "forward" and residual else direction.upper()


def rules(direction: str, residual: bool) -> dict[str, configs.Rule]:
    """name -> rule. The table's own comes first."""
    own = getattr(configs, rule_name(direction, residual))

    def changed(changes: dict) -> configs.Rule:
        ways = changes.get("ways", own.ways)
        ways = WAYS[ways] if isinstance(ways, str) else [ways] if isinstance(ways[0], int) else ways
        ways = [configs.Way(most, min(steps, 4)) if residual else configs.Way(most, steps) for most, steps in ways]
        return replace(own, **{**changes, "ways": tuple(ways)})

    told = (" ".join(f"{k}={v}" for k, v in changes.items()) for changes in CHANGES[direction])
    return {"table": own} | dict(zip(told, map(changed, CHANGES[direction]), strict=True))


def calls(M: int, C: int, dtype: torch.dtype, centre: bool, residual: bool):
    """-> forward(), backward()"""
    given = {"device": "cuda", "dtype": dtype}
    x, dy = torch.randn(M, C, **given), torch.randn(M, C, **given)
    added = torch.randn(M, C, **given) if residual else None
    weight, bias = torch.randn(C, **given), torch.randn(C, **given) if centre else None
    _, h, mean, rstd = norm_forward(x, weight, bias, added, 1e-5, centre)
    h = h if residual else x
    return (
        lambda: norm_forward(x, weight, bias, added, 1e-5, centre),
        lambda: norm_backward(dy, added, h, weight, mean, rstd, centre, centre),
    )


def with_rule(name: str, rule: configs.Rule, call):
    def run():
        setattr(configs, name, rule)
        return call()

    return run


def rows_with(where: str, rule: configs.Rule, direction: str, C: int, size: int, residual: bool, kind) -> configs.Rows:
    own = getattr(configs, where)
    setattr(configs, where, rule)
    try:
        return getattr(configs, f"norm_{direction}")(C, size, residual, kind)
    finally:
        setattr(configs, where, own)


def fits(rows: configs.Rows, direction: str, vectors: int) -> bool:
    """Is there a kernel? Forward: of 2 vectors a thread blocks of at most 256 threads, of 8 vectors no clusters."""
    steps = configs.cdiv(configs.cdiv(vectors, rows.cluster), rows.threads)
    if direction == "backward":
        return steps <= 4
    return rows.threads * rows.rows <= (256 if steps <= 2 else 1024) and (steps <= 4 or rows.cluster == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the C++ norms with other configurations.")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    print(describe_machine())
    clock = CudaClock()
    clock.SECONDS, clock.FEWEST, clock.MOST = 0.01, 5, 12
    copy = clock.limits(torch.bfloat16)["B"]
    print(f"copy {copy / 1e12:.2f} TB/s")
    dtype, results = DTYPES[options.dtype], []
    for shape in options.shape:
        M, C = sizes(shape)
        for centre, residual in ((True, False), (False, True)):
            both = dict(zip(("forward", "backward"), calls(M, C, dtype, centre, residual), strict=True))
            for direction, call in both.items():
                kind = configs.kind_of(torch.cuda.current_device())
                seen, contestants, told = set(), {}, {}
                where, listed = rule_name(direction, residual), rules(direction, residual)
                for name, rule in listed.items():
                    rows = rows_with(where, rule, direction, C, dtype.itemsize, residual, kind)
                    legal = name == "table" or (rows.threads and fits(rows, direction, C * dtype.itemsize // 16))
                    if str(rows) not in seen and legal:
                        seen.add(str(rows))
                        contestants[name], told[name] = with_rule(where, rule, call), str(rows)
                passes = 4 if residual else {"forward": 2, "backward": 3}[direction]
                times = clock.take_turns(contestants)
                setattr(configs, where, listed["table"])
                what = f"{'rms_norm with residual' if residual else 'layer_norm'} {direction} {shape}"
                print(what)
                for name in sorted(times, key=lambda name: times[name].median):
                    share = passes * M * C * dtype.itemsize / times[name].median / copy
                    print(f"  {share:6.1%} {times[name].median * 1e6:8.1f} us  {name}: {told[name]}")
                    results.append({"what": what, "rule": name, "rows": told[name], "us": times[name].median * 1e6,
                                    "of copy": share})  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine_facts(), "copy": copy, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
