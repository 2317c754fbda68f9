"""Every tile shape of the sm_90a product, timed on a GPU beside cuBLAS: for the table in
megakern/kernels/cuda/linear_plan.py.

    python -m benchmarks.tune_linear [--shape 8192x8192x8192 ...] [--layers] [--compile] [--epilogues] [--json FILE]

Shapes are M x N x K of y (M, N) = x W^T, bf16. TFLOP/s, and how many times cuBLAS's speed. --layers: forward, dx and dW
of the layers of Llama 8B and GPT-2 1.5B at 8192 tokens, and dW added to an fp32 gradient; --compile: beside
torch.compile. An empty --shape leaves the single shapes out. --epilogues: what follows a product of 8192 x 16384 x
4096, and SwiGLU of 8192 x 2 x 14336 x 4096.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.common import describe_machine, machine_facts, sizes
from benchmarks.timing import CudaClock
from megakern.kernels.cuda.linear import BAND, multiprocessors, product
from megakern.kernels.cuda.linear_plan import GATED, NN, NT, OTHER_TILES, TILES, TN, choose, epilogue_weight, plan_of

SHAPES = ["8192x8192x8192", "4096x4096x4096", "2048x2048x2048", "1024x4096x4096", "64x8192x8192", "16x28672x4096"]
LLAMA = ["8192x6144x4096", "8192x4096x4096", "8192x28672x4096", "8192x4096x14336"]
GPT2 = ["8192x4800x1600", "8192x1600x1600", "8192x6400x1600", "8192x1600x6400"]
LAYOUTS = {NT: "forward", NN: "dx", TN: "dW"}


def variants(tile, layout, M, N, K):
    """(name, arguments) of what is tried with a tile shape."""
    plan = plan_of(tile, M, N, K, multiprocessors(torch.device("cuda", 0)), layout)
    yield str(tile), {"plan": plan}
    if tile.rows * tile.cols == 128 * 256:
        for steps in (0, 1, 3):  # the default: 2
            yield f"{tile}, head start of {steps}", {"plan": plan, "head_start": steps}
        for band in (BAND // 2, BAND * 2):
            yield f"{tile}, bands of {band}", {"plan": plan, "band": band}


def contestants(layout, M, N, K, every_variant):
    """Calls of one product (M, N) of sums over K, from operands that lie as `layout` says."""
    a, b = (torch.randn(size, K, device="cuda").bfloat16() for size in (M, N))
    stored_a = a.t().contiguous() if layout == TN else a
    stored_b = b if layout == NT else b.t().contiguous()
    left, right = stored_a.t() if layout == TN else stored_a, stored_b.t() if layout == NT else stored_b
    out = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    calls = {"cuBLAS": lambda: torch.matmul(left, right, out=out)}
    for tile in (*TILES, *OTHER_TILES):
        for name, arguments in list(variants(tile, layout, M, N, K))[: None if every_variant else 1]:
            calls[name] = lambda arguments=arguments: product(layout, stored_a, stored_b, out, **arguments)
    chosen = choose(M, N, K, multiprocessors(torch.device("cuda", 0)), layout)
    if chosen.splits > 1:
        calls[in_parts(chosen)] = lambda: product(layout, stored_a, stored_b, out, plan=chosen)
    return calls


def name_of(plan):
    """Among the contestants."""
    return str(plan.tile) if plan.splits == 1 else in_parts(plan)


def verdict(rows) -> str:
    """A line for each product of a layer: how many times cuBLAS's speed the model's choice has, and the best tile."""
    lines = ["| product | M x N x K | chosen | x cuBLAS | best | x cuBLAS |", "|---|---|---|---|---|---|"]
    races: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["chosen"]:
            races.setdefault((row["what"], row["M"], row["N"], row["K"], row["chosen"]), {})[row["name"]] = row[
                "x_cublas"
            ]
    for (what, M, N, K, chosen), shares in races.items():
        ours = {name: share for name, share in shares.items() if name not in ("cuBLAS", "torch.compile")}
        best = max(ours, key=ours.get)
        lines.append(f"| {what} | {M} x {N} x {K} | {chosen} | {ours[chosen]:.3f} | {best} | {ours[best]:.3f} |")
    return "\n".join(lines)


def in_parts(plan):
    return f"{plan.tile}, the last {plan.tiles - plan.whole} in {plan.splits} parts along K"


def compiled(layout, M, N, K):
    """torch.compile of the same product: it may choose cuBLAS or a kernel of Triton's that it has timed."""
    a, b = ((K, M) if layout == TN else (M, K)), ((N, K) if layout == NT else (K, N))
    a, b = (torch.randn(*shape, device="cuda").bfloat16() for shape in (a, b))
    a, b = a.t() if layout == TN else a, b.t() if layout == NT else b
    call = torch.compile(torch.matmul, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {"torch.compile": lambda: call(a, b)}


def accumulated(M, N, K):
    """into (M, N), fp32 += a^T b: what a second micro-batch does with a weight's gradient."""
    a, b = (torch.randn(K, size, device="cuda").bfloat16() for size in (M, N))
    into = torch.zeros(M, N, device="cuda")
    calls = {"cuBLAS": lambda: into.add_(torch.matmul(a.t(), b))}
    problem = M, N, K, multiprocessors(torch.device("cuda", 0)), TN, epilogue_weight(wide=True)
    plans = {str(tile): plan_of(tile, *problem) for tile in TILES}
    if choose(*problem).splits > 1:
        plans[in_parts(choose(*problem))] = choose(*problem)
    for name, plan in plans.items():
        calls[name] = lambda plan=plan: product(TN, a, b, into, accumulate=True, plan=plan)
    return calls


def epilogues(M, N, K):
    x, weight = torch.randn(M, K, device="cuda").bfloat16(), (torch.randn(N, K, device="cuda") * K**-0.5).bfloat16()
    bias = torch.randn(N, device="cuda").bfloat16()
    residual, pre, out = (torch.randn(M, N, device="cuda").bfloat16() for _ in range(3))
    calls = {
        "cuBLAS": lambda: F.linear(x, weight),
        "cuBLAS, bias": lambda: F.linear(x, weight, bias),
        "cuBLAS, bias, gelu_tanh": lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh"),
        "cuBLAS, bias, gelu": lambda: F.gelu(F.linear(x, weight, bias)),
        "cuBLAS, residual": lambda: F.linear(x, weight) + residual,
    }
    follows = {
        "nothing": {},
        "bias": {"bias": bias},
        "bias, gelu_tanh": {"bias": bias, "activation": "gelu_tanh"},
        "bias, gelu": {"bias": bias, "activation": "gelu"},
        "bias, gelu_tanh, pre-activation kept": {"bias": bias, "activation": "gelu_tanh", "pre": pre},
        "residual": {"residual": residual},
    }
    for tile in (*TILES, *OTHER_TILES):
        if tile.rows == 128:
            plan = plan_of(tile, M, N, K, multiprocessors(torch.device("cuda", 0)))
            for steps in (0, 2) if tile.cols == 256 else (0,):
                for name, more in follows.items():
                    keywords = {"plan": plan, "head_start": steps, **more}
                    calls[f"{tile}, head start of {steps}: {name}"] = lambda keywords=keywords: product(
                        NT, x, weight, out, **keywords
                    )
    return calls


def gated(M, N, K):
    """silu(x gate^T) * (x up^T), both (M, N), nothing kept."""
    x, out = torch.randn(M, K, device="cuda").bfloat16(), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    gate, up = ((torch.randn(N, K, device="cuda") * K**-0.5).bfloat16() for _ in range(2))
    calls = {"cuBLAS": lambda: F.silu(F.linear(x, gate)) * F.linear(x, up)}
    for tile in TILES:
        if tile.gated:
            plan = plan_of(tile, M, 2 * N, K, multiprocessors(x.device), GATED)
            calls[str(tile)] = lambda plan=plan: product(GATED, x, gate, out, b_up=up, plan=plan)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=SHAPES)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--epilogues", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock, rows = CudaClock(), []

    def race(what, M, N, K, calls, layout=NT, weight=0.0):
        times = {name: turns.median for name, turns in clock.take_turns(calls).items()}
        chosen = choose(M, N, K, multiprocessors(torch.device("cuda", 0)), layout, weight)
        name_of_chosen = name_of(chosen) if name_of(chosen) in times else ""
        print(f"\n{what} {M} x {N} x {K}; chosen: {chosen}", flush=True)
        for name, seconds in times.items():
            rate, share = 2 * M * N * K / seconds, times["cuBLAS"] / seconds
            print(f"  {name:<70}{seconds * 1e6:>10.1f} us{rate / 1e12:>8.0f} TFLOP/s{share:>8.3f}", flush=True)
            row = {"what": what, "M": M, "N": N, "K": K, "name": name, "us": seconds * 1e6, "x_cublas": share}
            rows.append({**row, "chosen": name_of_chosen})

    print(describe_machine(), flush=True)
    for shape in options.shape:
        M, N, K = sizes(shape)
        race("forward", M, N, K, contestants(NT, M, N, K, M >= 4096))
    for shape in (*LLAMA, *GPT2) if options.layers else ():
        M, N, K = sizes(shape)
        for layout, mine in ((NT, (M, N, K)), (NN, (M, K, N)), (TN, (N, K, M))):
            calls = contestants(layout, *mine, False)
            if options.compile:
                torch._dynamo.reset()  # else it gives up at the ninth shape
                calls |= compiled(layout, *mine)
            race(LAYOUTS[layout], *mine, calls, layout)
        race("dW added in fp32", N, K, M, accumulated(N, K, M), TN, epilogue_weight(wide=True))
    if options.epilogues:
        race("epilogues", 8192, 16384, 4096, epilogues(8192, 16384, 4096))
        race("SwiGLU", 8192, 2 * 14336, 4096, gated(8192, 14336, 4096), GATED, epilogue_weight(activation=True))
    print(f"\n{verdict(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
