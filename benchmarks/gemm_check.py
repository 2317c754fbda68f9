"""Each tile shape of the sm_90a product: right against float64 in every layout, then timed beside cuBLAS.

    MEGAKERN_CUDA_ARCHS=90a NVCC_APPEND_FLAGS="-DMEGAKERN_SPINS=100000 -DMEGAKERN_TRIAL_TILES" \
        python csrc/build.py cuda && python -m benchmarks.gemm_check [right] [timed]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch

from megakern.kernels.cuda import linear
from megakern.kernels.cuda.linear import NN, NT, TILES, TN, Tile, product
from megakern.ops.linear import linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there simt: of the script, not of the kernels
SIZES = [(128, 256, 64), (8, 8, 8), (1, 16, 72), (256, 512, 192), (200, 264, 328), (129, 136, 1000), (1000, 2056, 520),
         (4096, 4096, 256), (4104, 3000, 264)]  # fmt: skip
TRIAL = [*TILES, Tile(128, 256, 2, 0, 0), Tile(256, 128, 2, 0, 0), Tile(128, 128, 2, 0, 0)]
LAYERS = [(8192, 6144, 4096), (8192, 4096, 4096), (8192, 28672, 4096), (8192, 4096, 14336),
          (8192, 4800, 1600), (8192, 1600, 1600), (8192, 6400, 1600), (8192, 1600, 6400)]  # fmt: skip
LAG = 1_000_000  # in band, where compiled for trials
NAMES = {NT: "nt", NN: "nn", TN: "tn"}


def name_of(tile):
    return f"{tile.rows}x{tile.cols}c{tile.cluster}"


def operands(layout, M, N, K, dtype, scale=1.0):
    g = torch.Generator(DEVICE).manual_seed(M + N + K)
    a, b = (torch.randn(s, generator=g, device=DEVICE) for s in ((M, K), (N, K)))
    a, b = a.to(dtype), (b * scale).to(dtype)
    stored_a = a if layout != TN else a.t().contiguous()
    stored_b = b if layout == NT else b.t().contiguous()
    return a, b, linear._operand(stored_a) if layout != TN or M % 8 == 0 else None, linear._operand(stored_b)


def compare(what, ours, exact, peer):
    error, theirs = ((x.double() - exact).abs().max().item() for x in (ours, peer))
    floor = 1e-5 * exact.abs().max().item()
    if not error <= 2 * theirs + floor:
        bad = ((ours.double() - exact).abs() > 2 * theirs + floor) | ours.isnan()
        rows, cols = bad.any(1).nonzero().flatten(), bad.any(0).nonzero().flatten()
        print(f"  WRONG {what}: error {error:.3e}, cuBLAS {theirs:.3e}; {bad.sum().item()} of {bad.numel()} elements, "
              f"rows {rows[:4].tolist()}..{rows[-1].item()} ({len(rows)}), cols {cols[:4].tolist()}..{cols[-1].item()} "
              f"({len(cols)})", flush=True)  # fmt: skip
        return False
    return True


def right(tile):
    good = bad = 0
    for dtype in (torch.bfloat16, torch.float16):
        for layout in (NT, NN, TN):
            for M, N, K in SIZES:
                a, b, stored_a, stored_b = operands(layout, M, N, K, dtype)
                if stored_a is None or M * N * 2 % 16 or N % 8:
                    continue
                for blocks in (132, 6):
                    out = torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE)
                    product(layout, stored_a, stored_b, out, tile=tile, blocks=blocks)
                    again = torch.empty_like(out)
                    product(layout, stored_a, stored_b, again, tile=tile, blocks=blocks)
                    exact = a.double() @ b.double().t()
                    what = f"{NAMES[layout]} {dtype} {M} x {N} x {K} blocks {blocks}"
                    ok = compare(what, out, exact, a @ b.t())
                    if ok and not torch.equal(out, again):
                        print(f"  WRONG {what}: two runs differ", flush=True)
                        ok = False
                    good, bad = good + ok, bad + (not ok)
                if layout == TN:
                    start = torch.randn(M, N, device=DEVICE)
                    into, wide = start.clone(), torch.full((M, N), float("nan"), device=DEVICE)
                    product(layout, stored_a, stored_b, into, accumulate=True, tile=tile)
                    product(layout, stored_a, stored_b, wide, tile=tile)
                    exact = a.double() @ b.double().t()
                    peer = a.float() @ b.float().t()
                    ok = compare(f"fp32 {what}", wide, exact, peer) & compare(
                        f"accumulated {what}", into, exact + start.double(), peer + start
                    )
                    good, bad = good + ok, bad + (not ok)
        for M, N, K in ((200, 264, 328), (1000, 2056, 520)):
            for activation in ("", "gelu", "gelu_tanh", "relu_squared", "silu"):
                a, b, stored_a, stored_b = operands(NT, M, N, K, dtype, K**-0.5)
                bias, residual = torch.randn(N, device=DEVICE), torch.randn(M, N, device=DEVICE).to(dtype)
                for given in (bias, bias.to(dtype)):
                    out, pre = (torch.full((M, N), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
                    product(NT, stored_a, stored_b, out, bias=given, pre=pre, residual=residual, activation=activation,
                            tile=tile)  # fmt: skip
                    keywords = {"activation": activation or None}
                    exact = linear_reference(
                        a.double(), b.double(), given.double(), residual=residual.double(), **keywords
                    )
                    peer = linear_reference(a, b, given, residual=residual, **keywords)
                    ok = compare(f"{activation} {dtype} {M} x {N} x {K}", out, exact, peer)
                    exact = linear_reference(a.double(), b.double(), given.double())
                    ok &= compare(f"pre {dtype} {M} x {N} x {K}", pre, exact, linear_reference(a, b, given))
                    good, bad = good + ok, bad + (not ok)
    print(f"  {good} right, {bad} wrong", flush=True)
    return bad == 0


def sums():
    for M, N in ((1, 8), (1000, 1032), (8192, 4096)):
        x = torch.randn(M, N, device=DEVICE).bfloat16()
        out = torch.empty(N, device=DEVICE)
        linear._column_sums(x, out)
        if not compare(f"column sums {M} x {N}", out[None], x.double().sum(0)[None], x.float().sum(0)[None]):
            return False
    print("  column sums right", flush=True)
    return True


def milliseconds(calls, rounds=12):
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda._sleep(200_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def line(what, ms, flops):
    rates = (f"{name} {flops / t / 1e9:.0f} ({ms['cuBLAS'] / t:.3f})" for name, t in ms.items())
    print(f"{what}: " + "; ".join(rates), flush=True)


def contest(layout, M, N, K, tiles, more=()):
    _, _, a, b = operands(layout, M, N, K, torch.bfloat16)
    out = torch.empty(M, N, dtype=torch.bfloat16, device=DEVICE)
    left, other = a.t() if layout == TN else a, b.t() if layout == NT else b
    calls = {"cuBLAS": lambda: torch.matmul(left, other, out=out)}
    for tile in tiles:
        calls[name_of(tile)] = lambda tile=tile: product(layout, a, b, out, tile=tile)
    for name, tile, keywords in more:
        calls[f"{name_of(tile)} {name}"] = lambda tile=tile, keywords=keywords: product(
            layout, a, b, out, tile=tile, **keywords
        )
    line(
        f"{M} x {N} x {K} {NAMES[layout]}, takes {name_of(linear.choose_tile(M, N, K, 132))}",
        milliseconds(calls),
        2 * M * N * K,
    )


def timed(tiles):
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    wide = [tile for tile in tiles if tile.rows * tile.cols == 128 * 256 and tile.rows == 128]
    variants = [(f"lag {lag}", tile, {"band": lag * LAG + 2048}) for lag in (1, 2, 3) for tile in wide]
    variants += [(f"band {band}", tile, {"band": band}) for band in (1024, 4096) for tile in wide]
    for M, N, K in ((8192, 8192, 8192), (4096, 4096, 4096), (8192, 16384, 4096)):
        contest(NT, M, N, K, tiles, variants)
    for M, N, K in ((2048, 2048, 2048), (1024, 4096, 4096), (64, 8192, 8192), (16, 28672, 4096)):
        contest(NT, M, N, K, tiles)
    for M, N, K in LAYERS:
        for layout, shape in ((NT, (M, N, K)), (NN, (M, K, N)), (TN, (N, K, M))):
            contest(layout, *shape, [tile for tile in tiles if tile.rows == 128])
    M, N, K = 8192, 16384, 4096
    _, _, a, b = operands(NT, M, N, K, torch.bfloat16, K**-0.5)
    bias = torch.randn(N, device=DEVICE).bfloat16()
    out, pre, residual = (torch.randn(M, N, device=DEVICE).bfloat16() for _ in range(3))
    F = torch.nn.functional
    calls = {
        "cuBLAS": lambda: F.linear(a, b),
        "cuBLAS, bias, gelu_tanh": lambda: F.gelu(F.linear(a, b, bias), approximate="tanh"),
        "cuBLAS, bias": lambda: F.linear(a, b, bias),
        "cuBLAS, residual": lambda: F.linear(a, b) + residual,
    }
    epilogues = {
        "plain": {},
        "bias": {"bias": bias},
        "fp32 bias": {"bias": bias.float()},
        "gelu_tanh": {"bias": bias, "activation": "gelu_tanh"},
        "gelu": {"bias": bias, "activation": "gelu"},
        "gelu_tanh, pre": {"bias": bias, "activation": "gelu_tanh", "pre": pre},
        "residual": {"residual": residual},
    }
    for tile in [tile for tile in tiles if tile.rows == 128]:
        for lag in (0, 2) if tile in wide else (0,):
            for name, keywords in epilogues.items():
                calls[f"{name_of(tile)} lag {lag} {name}"] = lambda tile=tile, keywords=keywords, lag=lag: product(
                    NT, a, b, out, tile=tile, band=lag * LAG + 2048, **keywords
                )
    ms = milliseconds(calls, 8)
    for name, t in ms.items():
        print(f"{M} x {N} x {K} {name}: {t:.3f} ms, {2 * M * N * K / t / 1e9:.0f} TFLOP/s", flush=True)
    return True


def start(*words):
    """This file in a process of its own: an error of the GPU ends that alone."""
    command = [sys.executable, "-m", "benchmarks.gemm_check", "one", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, seconds):
    try:
        told, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        told = process.communicate()[0] + f"  NOT DONE after {seconds} s"
    lines = told.splitlines()
    print("\n".join(lines[:60]) + f"\n  exit {process.returncode}", flush=True)
    return process.returncode == 0


def one(what, tiles):
    chosen = [tile for tile in TRIAL if name_of(tile) in tiles]
    ok = sums() if what == "sums" else timed(chosen) if what == "timed" else all([right(tile) for tile in chosen])
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], sys.argv[3:])
    wanted = sys.argv[1:] or ["right", "timed"]
    tiles = [name_of(tile) for tile in TRIAL]
    if "right" in wanted:
        running = {"sums": start("sums"), **{tile: start("right", tile) for tile in tiles}}
        good = set()
        for name, process in running.items():
            print(name, flush=True)
            if finish(process, 60):
                good.add(name)
        tiles = [tile for tile in tiles if tile in good]
    if "timed" in wanted and tiles:
        print("times, TFLOP/s (x cuBLAS)", flush=True)
        finish(start("timed", *tiles), 120)
