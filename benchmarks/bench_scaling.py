"""A training step over processes of this machine: tensor, sequence and data parallel beside one core and all cores.

    python -m benchmarks.bench_scaling [--seconds N] [--quick] [--json FILE]

The work is the same for all (strong scaling); a process has its share of the cores. `efficiency` is the speed beside
one process on one core, over the cores that are used: 100 % is ideal. One layout runs at a time, `communication` is
what a profile of rank 0 has in collectives, waiting for the others included (which gloo's entries do not show). Layouts
with tp also time an all-reduce alone, of 3072 x 384, begun by all ranks at once. "gloo": MEGAKERN_SHARED_MEMORY=0.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import megakern as mk
from benchmarks import report, steps
from benchmarks.breakdown import breakdown
from benchmarks.common import begin_part, end_part, part_parser
from megakern.parallel import shared
from megakern.parallel.collectives import all_reduce
from megakern.train import build, launch, machine
from megakern.train.config import ParallelConfig

MODEL = {"layers": 4, "width": 384, "heads": 6, "vocab_size": 1024, "vocab_multiple": 2, "sequence_length": 256}
BATCH = 8
ALONE = (3072, 384)
GLOO = ", gloo"


def layouts(cores: int, *, quick: bool = False) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Name -> processes, threads of each, settings of `[parallel]`. A quick run has tensor parallelism alone.

    A name that ends in GLOO: without shared memory.
    """
    found: dict[str, tuple[int, int, dict[str, Any]]] = {"1 core": (1, 1, {})}
    if cores > 1:
        tensor, sequence = {"tp": 2}, {"tp": 2, "sequence_parallel": True}
        found |= {
            f"{cores} threads": (1, cores, {}),
            "tp = 2": (2, cores // 2, tensor),
            f"tp = 2{GLOO}": (2, cores // 2, tensor),
            "tp = 2, sequence parallel": (2, cores // 2, sequence),
            f"tp = 2, sequence parallel{GLOO}": (2, cores // 2, sequence),
            "dp = 2": (2, cores // 2, {"dp": 2}),
            "dp = 2, zero 3": (2, cores // 2, {"dp": 2, "zero": 3}),
        }
    return {
        name: layout
        for name, layout in found.items()
        if not quick or (layout[2] in ({}, {"tp": 2}) and GLOO not in name)
    }


def all_reduce_alone(group: dist.ProcessGroup, turns: int) -> dict[str, float]:
    """Median ms of an all-reduce of ALONE, by dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(ALONE, dtype=dtype)
        seconds = []
        for _ in range(2 * turns + 1):
            dist.barrier()
            start = time.perf_counter()
            all_reduce(x, group)
            seconds.append(time.perf_counter() - start)
        found[str(dtype).removeprefix("torch.")] = statistics.median(seconds[1:]) * 1e3
    return found


def rank_main(
    rank: int, world: int, threads: int, settings: dict, gloo: bool, port: int, shape: dict, turns: int, pipe
) -> None:
    """One rank: warm up, time `turns` steps, profile two; rank 0 tells."""
    os.environ["MEGAKERN_SHARED_MEMORY"] = "0" if gloo else "1"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS=str(threads))  # fmt: skip
    torch.set_num_threads(threads)
    parallel = launch.join(ParallelConfig(**settings))
    config = mk.GPTConfig(**shape)
    run = steps.run_config(config, "fp32")
    run = dataclasses.replace(run, parallel=ParallelConfig(**settings).over(world))
    model = build.make_model(run, parallel, machine.device_type())
    step = steps.step_of(model, build.make_optimizer(model, run))
    rows = BATCH // parallel.size("dp")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (BATCH, config.sequence_length + 1), generator=generator)
    ids = ids[parallel.rank("dp") * rows :][:rows]
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    loss = step(tokens, targets)
    step(tokens, targets)
    seconds = []
    for _ in range(turns):
        parallel.barrier()
        start = time.perf_counter()
        step(tokens, targets)
        seconds.append(time.perf_counter() - start)
    found = breakdown(lambda: step(tokens, targets), 2)
    alone, transport = None, ""
    if parallel.tp_group is not None:
        alone, transport = all_reduce_alone(parallel.tp_group, turns), shared.describe(parallel.tp_group)
    if rank == 0:
        pipe.send((seconds, loss, found, machine.peak_memory(parallel.device()), alone, transport))
    if dist.is_initialized():
        parallel.barrier()
        dist.destroy_process_group()


def measure_layout(name: str, processes: int, threads: int, settings: dict, shape: dict, turns: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(
            target=rank_main,
            args=(r, processes, threads, settings, name.endswith(GLOO), port, shape, turns, theirs),
            daemon=True,
        )
        for r in range(processes)
    ]
    for rank in ranks:
        rank.start()
    theirs.close()
    try:
        seconds, loss, found, peak, alone, transport = ours.recv()
    except EOFError:
        raise RuntimeError(f"{name}: a rank ended without a result; what it said is above") from None
    finally:
        for rank in ranks:
            rank.join(20)
            rank.kill()
    middle = statistics.median(seconds)
    return {
        "layout": name,
        "processes": processes,
        "threads": threads,
        "ms": middle * 1e3,
        "fastest_ms": min(seconds) * 1e3,
        "slowest_ms": max(seconds) * 1e3,
        "tokens_per_second": BATCH * shape["sequence_length"] / middle,
        "communication_ms": found["ms"]["communication"],
        "breakdown": found,
        "peak_bytes": peak,
        "loss": loss,
        "all_reduce_ms": alone,
        "transport": transport,
    }


def measure(shape: dict, turns: int, deadline: float, *, quick: bool = False) -> dict[str, Any]:
    """Results as scaling.json keeps them. Raises RuntimeError when a layout has another loss than one process."""
    rows: list[dict[str, Any]] = []
    for name, (processes, threads, settings) in layouts(machine.cores(), quick=quick).items():
        if rows and time.monotonic() > deadline:
            print(f"{name}: LEFT OUT, no time left", flush=True)
            continue
        row = measure_layout(name, processes, threads, settings, shape, turns)
        rows.append(row)
        row["speedup"] = rows[0]["ms"] / row["ms"]
        row["efficiency"] = row["speedup"] / (processes * threads)
        if "dp" not in settings and not abs(row["loss"] - rows[0]["loss"]) <= 1e-5 * rows[0]["loss"]:
            raise RuntimeError(f"{name}: first loss {row['loss']:.6f}, one process has {rows[0]['loss']:.6f}")
    return {"model": shape, "batch": BATCH, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    less = "three steps, one layout of two processes"
    parser = part_parser(__doc__, seconds=90.0, until="no layout begins after that", quick=less)
    options = begin_part(parser, arguments)
    turns = 3 if options.quick else 9
    end_part(options, measure(MODEL, turns, options.deadline, quick=options.quick), report.scaling_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
