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


def rules() -> dict[str, dict[str, configs.Rule]]:
    """direction -> name -> rule. The table's own comes first."""
    forward, backward = configs.FORWARD, configs.BACKWARD
    tried = {
        "forward": [
            *({"threads": threads, "steps": steps} for threads in (128, 256, 512) for steps in (2, 4, 8)),
            {"resident": 768}, {"resident": 512}, {"most": 1024}, {"most": 4096}, {"clusters": (264, 132, 64, 32)},
        ],
        "backward": [
            *({"threads": threads, "steps": steps} for threads in (128, 256, 512) for steps in (1, 2, 4)),
            {"most": 1024}, {"most": 512}, {"clusters": (132, 66, 32, 16)}, {"clusters": (132, 64, 31, 15)},
            {"clusters": (264, 132, 64, 32)},
        ],
    }  # fmt: skip
    own = {"forward": forward, "backward": backward}
    return {
        direction: {"table": own[direction]}
        | {" ".join(f"{k}={v}" for k, v in changes.items()): replace(own[direction], **changes) for changes in listed}
        for direction, listed in tried.items()
    }


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


def with_rule(direction: str, rule: configs.Rule, call):
    name = direction.upper()

    def run():
        setattr(configs, name, rule)
        return call()

    return run


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
    listed = rules()
    own = {direction: rules_["table"] for direction, rules_ in listed.items()}
    for shape in options.shape:
        M, C = sizes(shape)
        for centre, residual in ((True, False), (False, True)):
            both = dict(zip(("forward", "backward"), calls(M, C, dtype, centre, residual), strict=True))
            for direction, call in both.items():
                kind = configs.kind_of(torch.cuda.current_device())
                seen, contestants, told = set(), {}, {}
                for name, rule in listed[direction].items():
                    inputs = {"forward": 1, "backward": 2}[direction] + residual
                    rows = configs._rows(rule, C, dtype.itemsize, inputs, kind)
                    if str(rows) not in seen:
                        seen.add(str(rows))
                        contestants[name], told[name] = with_rule(direction, rule, call), str(rows)
                passes = 4 if residual else {"forward": 2, "backward": 3}[direction]
                times = clock.take_turns(contestants)
                setattr(configs, direction.upper(), own[direction])
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
