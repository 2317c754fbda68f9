"""Every tile configuration of the Triton attention kernels, timed on a GPU one after another: for the table in
megakern/kernels/triton/configs.py.

    python -m benchmarks.tune_attention [--shape 2x8192x64x8x128[:full] ...] [--dtype bf16] [--more] [--json FILE]

Each kernel is launched alone. FLOPs are those of attention (forward 1, backward 2.5), not of the products that a kernel
makes: of the backward pass the key-value gradient counts 1.5 and the query gradient 1. `--more` tries a grid of tiles,
warps and stages beside the named configurations; what does not fit in shared memory is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import describe_machine, machine_facts, sizes
from megakern.kernels.triton import attention, attention_backward, attention_tiles, configs
from megakern.train.machine import DTYPES

SHARES = {"forward": 1.0, "key-value gradient": 1.5, "query gradient": 1.0}
GRID = tuple(itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))


def candidates(role: str, D: int, more: bool) -> list[configs.Config]:
    named = list(configs.ATTENTION[role, configs.head_tile(D)])
    tried = {(c.tiles["BM"], c.tiles["BN"], c.warps, c.stages) for c in named}
    grid = [g for g in GRID if g not in tried] if more else []
    if role == "key-value gradient":  # there the keys are the rows of the products
        grid = [(BN, BM, warps, stages) for BM, BN, warps, stages in grid]
    return named + [configs.Config(f"{a}x{b}-{w}-{s}", {"BM": a, "BN": b}, w, s) for a, b, w, s in grid]


def milliseconds(call, target: float = 0.05) -> float:
    """The median of repeated calls, after two that compile and warm up."""
    call(), call()
    torch.cuda.synchronize()
    times = []
    while sum(times) < target * 1e3 or len(times) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every tile configuration of the Triton attention kernels.")
    parser.add_argument("--shape", nargs="+", default=["2x8192x64x8x128", "2x8192x64x8x128:full", "1x16384x32x32x64"])
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--role", nargs="+", choices=sorted(SHARES), default=list(SHARES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(describe_machine())
    rows = []
    for shape in options.shape:
        dims, _, kind = shape.partition(":")
        B, T, H, Hkv, D = sizes(dims)
        draw = lambda heads: torch.randn(B, T, heads, D, device="cuda", dtype=DTYPES[options.dtype])  # noqa: E731, B023
        q, k, v, dout = draw(H), draw(Hkv), draw(Hkv), draw(H)
        how = (None, None, None, (-1, -1 if kind == "full" else 0), D**-0.5, 0.0, 0.0, (0, 0, 0))
        out, lse = attention.attention_forward(q, k, v, *how, True)
        call = attention_tiles.Call(q, k, *how)
        delta = attention_backward.row_sums(dout, out)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        runs = {
            "forward": lambda: attention.attention_forward(q, k, v, *how, True),  # noqa: B023
            "key-value gradient": lambda: attention_backward.key_value_gradient(call, dout, v, lse, delta, dk, dv),  # noqa: B023
            "query gradient": lambda: attention_backward.query_gradient(call, dout, v, lse, delta, dq),  # noqa: B023
        }
        work = (4.0 if kind == "full" else 2.0) * B * H * T * T * D
        for role in options.role:
            for config in candidates(role, D, options.more):
                with mock.patch.object(configs, "attention", lambda *arguments, config=config: config):
                    try:
                        ms = milliseconds(runs[role])
                    except Exception as error:  # noqa: BLE001 - too large for this GPU: the next one
                        print(f"{shape:<24}{role:<20}{config.name:<18}{type(error).__name__}: {str(error)[:80]}")
                        continue
                rate = SHARES[role] * work / ms / 1e9
                rows.append({"shape": shape, "role": role, "config": config.name, "ms": ms, "TFLOP/s": rate})
                print(f"{shape:<24}{role:<20}{config.name:<18}{ms:>9.3f} ms{rate:>8.0f} TFLOP/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
