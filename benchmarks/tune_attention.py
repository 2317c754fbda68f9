"""Configurations of the attention kernels, timed on a GPU one after another: for the tables in
megakern/kernels/triton/attention_configs.py, and the sizes in megakern/kernels/cuda/attention*.py.

    python -m benchmarks.tune_attention [--backend cuda triton] [--shape 2x8192x64x8x128[:full] ...] [--dtype bf16]
                                        [--decode 32x8192x64x8x128 ...] [--role ...] [--json FILE]

Triton: each kernel is launched alone: the named configurations, and those of GRID below. They are compiled first, on
all cores. C++: forward and backward whole; each tile, forward with single blocks and with pairs that share keys and
values, and heads side by side whose data fill so many MB of cache; dq is added in any order and in a fixed one;
PyTorch's FlashAttention 2 and cuDNN beside them.
FLOPs are those of attention (forward 1, backward 2.5), not of the products a kernel makes: of the backward pass the
key-value gradient counts 1.5 and the query gradient 1. Decoding, one query a sample, BxSxHxHkvxD: pieces that the keys
are split into; bytes of keys and values. A configuration that does not fit on the GPU is named. Other tables:
--shape 2x8192x64x8x128:full 1x16384x32x32x64:full 1x8192x16x16x256
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

from benchmarks.bench_attention import by
from benchmarks.common import describe_machine, machine_facts, sizes
from megakern.kernels.cuda import attention as cuda_attention
from megakern.kernels.cuda import attention_backward as cuda_backward
from megakern.kernels.cuda import attention_decode as cuda_decode
from megakern.kernels.triton import attention, attention_backward, attention_tiles
from megakern.kernels.triton import attention_configs as configs
from megakern.ops.dispatch import UNAVAILABLE
from megakern.train.machine import DTYPES

SHARES = {"forward": 1.0, "key-value gradient": 1.5, "query gradient": 1.0, "backward": 2.5, "decode": 1.0}
ROLES = {"triton": ("forward", "key-value gradient", "query gradient"), "cuda": ("forward", "backward", "decode")}
SPLITS = (1, 2, 3, 4, 6, 8, 16)
PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
CACHES = (8, 16, 32, 64)  # MB
ORDERS = {"any order": False, "fixed order": True}
# BM, BN, warps, stages beside the named ones
GRID = {
    "forward": (
        (128, 128, 8, 1), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 1), (64, 128, 4, 2), (64, 32, 4, 4), (128, 64, 4, 3), (128, 128, 4, 2),
    ),
    "key-value gradient": (
        (64, 128, 8, 1), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 1), (64, 64, 4, 3),
        (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 4, 1),
        (128, 128, 8, 1), (64, 64, 8, 2), (32, 64, 8, 3),
    ),
    "query gradient": (
        (128, 64, 8, 1), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 1), (64, 64, 4, 3), (64, 128, 4, 1),
        (64, 128, 4, 2), (64, 32, 4, 2), (64, 32, 4, 4), (128, 128, 8, 2), (128, 64, 4, 1), (128, 64, 4, 2),
    ),
}  # fmt: skip


def candidates(role: str, D: int) -> list[configs.Config]:
    named = list(configs.ATTENTION[role, configs.head_tile(D)])
    known = {(c.tiles["BM"], c.tiles["BN"], c.warps, c.stages) for c in named}
    return named + [
        configs.Config(f"{a}x{b}-{w}-{s}", {"BM": a, "BN": b}, w, s)
        for a, b, w, s in GRID[role]
        if (a, b, w, s) not in known
    ]


def inputs(shape: str, dtype: str, rows: int | None = None, device: str = "cuda"):
    """q, k, v, dout; what the launchers take behind them; the FLOPs of a forward pass."""
    dims, _, kind = shape.partition(":")
    B, T, H, Hkv, D = sizes(dims)
    T = rows or T
    tensors = [torch.randn(B, T, n, D, device=device, dtype=DTYPES[dtype]) for n in (H, Hkv, Hkv, H)]
    how = (None, None, None, (-1, -1 if kind == "full" else 0), D**-0.5, 0.0, 0.0, (0, 0, 0))
    return tensors, how, (4.0 if kind == "full" else 2.0) * B * H * T * T * D


def cuda_calls(role: str, shape: str, dtype: str, device: str = "cuda"):
    """(configuration, call) of the C++ kernels, the FLOPs of a forward pass, of decoding the bytes it reads."""
    if role == "decode":
        return decode_calls(shape, dtype, device)
    (q, k, v, dout), how, work = inputs(shape, dtype, device=device)
    out, lse = cuda_attention.attention_forward(q, k, v, *how, True)
    found = []
    if role == "forward":
        call = partial(cuda_attention.attention_forward, q, k, v, *how, True)
        found.append(("plain grid", with_value(cuda_attention, "multiprocessors", lambda device: 1 << 16, call)))
        most = next(most for most in cuda_attention.TILES if q.shape[-1] <= most)
        for tile in cuda_attention.TILES[most]:
            found.append((str(tile), with_value(cuda_attention, "tile_for", lambda *problem, tile=tile: tile, call)))
        (T, H, D), Hkv = q.shape[-3:], k.shape[-2]
        for pairs in cuda_attention.possible_pairs(T, H, Hkv, cuda_attention.tile_for(D, T, True), how[3] == (-1, -1)):
            found.append(
                (str(pairs), with_value(cuda_attention, "pairs_for", lambda *problem, pairs=pairs: pairs, call))
            )
    else:
        most = next(most for most in cuda_backward.TILES if q.shape[-1] <= most)
        for tile, (order, fixed) in itertools.product(cuda_backward.TILES[most], ORDERS.items()):
            call = partial(cuda_backward.attention_backward, dout, q, k, v, out, lse, *how, fixed)
            choose = with_value(cuda_backward, "tile_for", lambda *problem, tile=tile: tile, call)
            found.append((f"{tile}, {order}", choose))
            if not fixed:
                found.append((f"{tile}, from registers", with_value(cuda_backward, "FROM_REGISTERS", True, choose)))
    for size in CACHES:
        if role == "forward":
            found.append((f"{size} MB", with_value(cuda_attention, "KEYS_IN_CACHE", size << 20, call)))
            continue
        for order, fixed in ORDERS.items():
            call = partial(cuda_backward.attention_backward, dout, q, k, v, out, lse, *how, fixed)
            found.append((f"{size} MB, {order}", with_value(cuda_backward, "QUERIES_IN_CACHE", size << 20, call)))
    if device == "cuda":
        found += [(name, peer(role, by(way, how[3][1] == 0), q, k, v, dout)) for name, way in PEERS.items()]
    return found, work


def peer(role: str, attend, q, k, v, dout):
    """A call of `attend`, or of its backward pass alone."""
    if role == "forward":
        return partial(attend, q, k, v)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return partial(torch.autograd.grad, attend(*leaves), leaves, dout, retain_graph=True)


def decode_calls(shape: str, dtype: str, device: str = "cuda"):
    """One query a sample against keys and values in one tensor, in as many pieces as are chosen, and in others."""
    B, S, H, Hkv, D = sizes(shape)
    q, k, v = (torch.randn(B, n, h, D, device=device, dtype=DTYPES[dtype]) for n, h in ((1, H), (S, Hkv), (S, Hkv)))
    call = partial(cuda_decode.decode, q, k, v, None, None, None, (-1, 0), D**-0.5, 0.0)
    chosen = cuda_decode.key_splits(B * Hkv * -(-(H // Hkv) // cuda_decode.ROWS), S, D)
    others = [n for n in SPLITS if n != chosen]
    found = [(f"{n} pieces", with_value(cuda_decode, "key_splits", lambda *sizes, n=n: n, call)) for n in others]
    return [(f"{chosen} pieces, chosen", call), *found], float(k.nbytes + v.nbytes)


def with_value(module, name: str, value, call):
    def patched():
        with mock.patch.object(module, name, value):
            call()

    return patched


def calls(shape: str, dtype: str, rows: int | None = None, device: str = "cuda"):
    """role -> a launch of its Triton kernel, and the FLOPs of a forward pass; with fewer rows to compile the same."""
    (q, k, v, dout), how, work = inputs(shape, dtype, rows, device)
    B, T, H, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty(B, H, T, device=device)
    call, (dq, dk, dv) = attention_tiles.Call(q, k, *how), (torch.empty_like(x) for x in (q, k, v))
    log, delta = torch.empty_like(lse), torch.empty_like(lse)
    if rows is None:
        out, lse = attention.attention_forward(q, k, v, *how, True)
        log, delta = attention_backward.query_gradient(call, dout, v, out, lse, dq)
    runs = {
        "forward": lambda: attention.attention_forward(q, k, v, *how, True),
        "key-value gradient": lambda: attention_backward.key_value_gradient(call, dout, v, log, delta, dk, dv),
        "query gradient": lambda: attention_backward.query_gradient(call, dout, v, out, lse, dq),
    }
    return runs, work


def run(role: str, config: configs.Config, call) -> None:
    with mock.patch.object(configs, "attention", lambda *arguments: configs.Choice((config,))):
        call()


def compile_one(job: tuple[str, str, str, configs.Config]) -> str | None:
    """In a process of its own; Triton keeps the machine code on disk. Why it cannot run, or None."""
    shape, dtype, role, config = job
    try:
        run(role, config, calls(shape, dtype, rows=256)[0][role])
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - whatever the compiler or the driver says of it
        return f"{type(error).__name__}: {str(error)[:90]}"
    return None


def milliseconds(call, target: float = 40.0) -> float:
    """The median of repeated calls, after one that warms up."""
    call()
    times: list[float] = []
    while sum(times) < target or len(times) < 3:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def time_triton(options, roles: list[str]) -> list[dict]:
    if not roles:
        return []
    jobs = [
        (shape, options.dtype, role, config)
        for shape in options.shape
        for role in roles
        for config in candidates(role, sizes(shape.partition(":")[0])[-1])
    ]
    # spawn: importing megakern has asked the GPU what it is, and CUDA does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), len(os.sched_getaffinity(0)))) as pool:
        refusals = pool.map(compile_one, jobs, chunksize=1)
    rows, runs, made_for, work = [], {}, None, 0.0
    for (shape, dtype, role, config), refusal in zip(jobs, refusals, strict=True):
        if refusal is not None:
            print(f"{shape:<24}{role:<20}{config.name:<22}{refusal}")
            continue
        if shape != made_for:
            runs.clear()
            (runs, work), made_for = calls(shape, dtype), shape
        rows.append(timed(shape, role, config.name, partial(run, role, config, runs[role]), work))
    return rows


def time_cuda(options, roles: list[str]) -> list[dict]:
    rows = []
    for role in roles:
        for shape in options.decode if role == "decode" else options.shape:
            found, work = cuda_calls(role, shape, options.dtype)
            rows += [timed(shape, role, name, call, work) for name, call in found]
    return rows


def timed(shape: str, role: str, name: str, call, work: float) -> dict:
    try:
        ms = milliseconds(call)
    except RuntimeError as error:  # a peer that has no kernel for it
        print(f"{shape:<24}{role:<20}{name:<22}{str(error)[:90]}", flush=True)
        return {"shape": shape, "role": role, "config": name, "error": str(error)}
    rate, unit = SHARES[role] * work / ms / 1e9, "TB/s" if role == "decode" else "TFLOP/s"
    print(f"{shape:<24}{role:<20}{name:<22}{ms:>9.3f} ms{rate:>8.{2 if unit == 'TB/s' else 0}f} {unit}", flush=True)
    return {"shape": shape, "role": role, "config": name, "ms": ms, unit: rate}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time configurations of the attention kernels.")
    parser.add_argument("--backend", nargs="+", choices=sorted(ROLES), default=sorted(ROLES))
    parser.add_argument("--shape", nargs="+", default=["2x8192x64x8x128", "1x16384x32x32x64"])
    parser.add_argument("--decode", nargs="+", default=["32x8192x64x8x128", "128x8192x64x8x128"], metavar="BxSxHxHkvxD")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--role", nargs="+", choices=sorted(SHARES), default=list(SHARES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    rows = []
    for backend in options.backend:
        roles = [role for role in ROLES[backend] if role in options.role]
        if reason := UNAVAILABLE[backend]:
            print(f"{backend}: not timed, {reason}", flush=True)
        else:
            timed_here = {"triton": time_triton, "cuda": time_cuda}[backend](options, roles)
            rows += [{"backend": backend, **row} for row in timed_here]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
