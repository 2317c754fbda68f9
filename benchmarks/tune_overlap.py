"""Sequence-parallel collectives whole and in pieces beside their products, timed over the GPUs of this machine or over
processes on its CPU: for DEFAULT_ROWS in megakern/parallel/overlap.py.

    python -m benchmarks.tune_overlap [--ranks N] [--rows 64 ...] [--width C] [--json FILE]

Forward and backward of the two halves' products of a block: an MLP of C, 4 C, C and `rows` tokens a rank. Milliseconds,
the slowest rank's; whole and in pieces in turns, medians of --turns. Without --ranks: all GPUs; without two GPUs, two
processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

import megakern as mk
from benchmarks.common import describe_machine, machine_facts
from megakern.parallel import overlap, shared
from megakern.train import launch, machine
from megakern.train.config import ParallelConfig

ROWS = {"cuda": (128, 256, 512, 1024, 2048, 4096), "cpu": (64, 256, 1024)}
WIDTH = {"cuda": 4096, "cpu": 384}
WAYS = {"whole": 0, "in pieces": 1}
"""overlap_rows: never, always."""


def step_of(parallel: mk.ParallelContext, rows: int, width: int, overlap_rows: int):
    """A call that does forward and backward of an MLP with `rows` tokens of this rank."""
    torch.manual_seed(0)
    context = dataclasses.replace(parallel, overlap_rows=overlap_rows)
    how = {"device": parallel.device(), "dtype": torch.bfloat16 if parallel.device().type == "cuda" else torch.float32}
    mlp = mk.ParallelMLP(width, 4 * width, parallel=context, **how)
    x = torch.randn(1, rows, width, **how).requires_grad_()
    dy = torch.randn(1, rows, width, **how)

    def step() -> None:
        mlp(x).backward(dy)
        mlp.zero_grad(set_to_none=False)
        x.grad = None

    return step


def seconds_of(parallel: mk.ParallelContext, step) -> float:
    """The slowest rank's, all having begun together."""
    on_gpu = parallel.device().type == "cuda"
    dist.barrier()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=parallel.device())
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def rank_main(rank: int, world: int, port: int, options: argparse.Namespace, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    parallel = launch.join(ParallelConfig(tp=world, sequence_parallel=True))
    found = []
    for rows in options.rows:
        steps = {name: step_of(parallel, rows, options.width, least) for name, least in WAYS.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.turns + 2):
            for name, step in steps.items():
                taken = seconds_of(parallel, step)
                times[name] += [taken] if turn >= 2 else []
        found.append({"rows": rows, **{name: statistics.median(each) * 1e3 for name, each in times.items()}})
    if rank == 0:
        results.put((shared.describe(parallel.tp_group), found))
    parallel.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> tuple[str, list[dict]]:
    """-> how the ranks talk; milliseconds by rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = multiprocessing.start_processes(
        rank_main, (options.ranks, port, options, results), options.ranks, join=False, start_method="spawn"
    )
    while not ranks.join(timeout=0.2):  # raises what a rank raised
        if not results.empty():
            break
    found = results.get()
    ranks.join()
    return found


def main(arguments: list[str] | None = None) -> None:
    gpus = torch.cuda.device_count()
    kind = "cuda" if machine.device_type() == "cuda" else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=max(2, gpus))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS[kind])
    parser.add_argument("--width", type=int, default=WIDTH[kind])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print(describe_machine(), flush=True)
    transport, rows = "", []
    if kind == "cuda" and gpus < options.ranks:
        print(f"not measured: it wants {options.ranks} GPUs, this machine has {gpus}", flush=True)
    else:
        transport, rows = measure(options)
        print(f"\n{options.ranks} ranks, {transport}; width {options.width}, {overlap.PIECES} pieces, ms", flush=True)
        for row in rows:
            whole, pieces = (row[name] for name in WAYS)
            print(
                f"  {row['rows']:>6} rows a rank: whole {whole:9.3f}   in pieces {pieces:9.3f}   {whole / pieces:.2f} x"
            )
    if options.json:
        facts = {"machine": machine_facts(), "ranks": options.ranks, "transport": transport, "width": options.width}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
