"""A whole training step: megakern beside a plain PyTorch GPT and transformers, in tokens a second.

    python -m benchmarks.bench_train [--workload NAME ...] [--only NAME ...] [--seconds N] [--quick] [--json FILE]

Contestants are those of steps.py, each in a process with all cores; they take turns. First all make three steps from
the same weights on the same batches, and their losses must agree. Workloads that do not fit into memory side by side
run a few contestants at a time, the first of all among them each time: ratios divide by it. `floor` is the time of a
step's matrix products at this machine's matmul rate, measured by each contestant: no step can be faster. MFU divides by
the same rate (on a GPU by the data sheet's), attention counted where the mask lets a query see a key, or in full.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

import megakern as mk
from benchmarks import report, steps
from benchmarks.breakdown import breakdown
from benchmarks.common import begin_part, end_part, part_parser
from benchmarks.contestants import Contestant, FailedError, NotHereError, goal, ratio_to
from megakern.model.flops import flops_per_token
from megakern.train import machine


@dataclass(frozen=True)
class Workload:
    """What is trained, and by whom; ratios divide by the first contestant."""

    name: str
    config: mk.GPTConfig
    batch: int
    contestants: tuple[str, ...]
    at_once: int = 9
    """Contestants that fit into memory side by side."""
    share: float = 1.0
    """Of the time, beside the other workloads."""
    memory: float = 0.0
    """Bytes that a GPU must have."""
    goals: tuple[tuple, ...] = field(default=())
    """(what, ours, peers, how many times as fast it shall be)"""


def gpt2(preset: str, **changes: Any) -> mk.GPTConfig:
    """Exact GELU, and the vocabulary of GPT-2 rounded up, as nanoGPT does it."""
    changes = {"activation": "gelu", "vocab_size": 50304, "vocab_multiple": 1, **changes}
    return dataclasses.replace(mk.presets[preset], **changes)


SMALL = {"layers": 6, "width": 384, "heads": 6, "vocab_size": 1024, "sequence_length": 256}
LLAMA = dataclasses.replace(mk.presets["llama-3-8b"], layers=4, sequence_length=4096)
BEST = ("plain bf16 autocast", "plain bf16 compiled")
# In the order in which they are measured, until time is up.
ON_GPU = ("plain bf16 autocast", "megakern bf16", "plain bf16 compiled", "transformers bf16 autocast",
          "megakern bf16 split", "Megatron-Core bf16 masters")  # fmt: skip
WORKLOADS = {
    "cpu": (
        Workload(
            "a small GPT", gpt2("gpt2-124m", **SMALL), 12,
            ("plain fp32", *BEST, "transformers fp32", "transformers bf16 autocast", "megakern fp32",
             "megakern fp32 bf16 products", "megakern bf16", "Megatron-Core bf16 masters"),
            goals=(
                ("bf16 beside nanoGPT's default", "megakern bf16", ("plain fp32",), 4.0),
                ("bf16 beside nanoGPT's best", "megakern bf16", BEST, 1.5),
                ("fp32 with bf16 products beside nanoGPT's fp32", "megakern fp32 bf16 products", ("plain fp32",), 1.8),
            ),
        ),
        Workload(
            "GPT-2 124M", gpt2("gpt2-124m", sequence_length=512), 4,
            ("plain fp32", "plain bf16 autocast", "megakern bf16", "megakern fp32", "plain bf16 compiled",
             "transformers bf16 autocast"), at_once=3, share=1.5,  # 4 to 5 GB each
            goals=(("bf16 beside nanoGPT's best", "megakern bf16", BEST, 1.3),),
        ),
    ),
    "cuda": (
        Workload("GPT-2 124M", gpt2("gpt2-124m"), 32, ON_GPU, at_once=3),
        Workload("GPT-2 1.5B", gpt2("gpt2-1.5b"), 8, ON_GPU, at_once=2),
        Workload(  # all of its widths; four of 32 layers, so that the optimizer's states of two contestants fit
            "Llama 3 8B, 4 layers", LLAMA, 2,
            ("transformers bf16 autocast", "megakern bf16", "transformers bf16 compiled", "megakern bf16 split",
             "Megatron-Core bf16 masters"),
            at_once=2,
        ),
        # All of Megatron-LM's 8.3 B on one card: 12 bytes a parameter, 100 GB, and what blocks keep of 4096 tokens.
        Workload("Megatron 8.3B", gpt2("megatron-8.3b"), 4, ("megakern bf16 split lean",), share=0.4, memory=110e9),
    ),
}  # fmt: skip
MOST_TURNS = 15
QUICK = ("plain fp32", "plain bf16 autocast", "megakern fp32", "megakern bf16")


def batch_of(workload: Workload, step: int):
    generator = torch.Generator().manual_seed(step)
    shape = (workload.batch, workload.config.sequence_length + 1)
    ids = torch.randint(0, workload.config.vocab_size, shape, generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Training:
    """One contestant, in its process."""

    def __init__(self, name: str, workload: Workload) -> None:
        torch.set_num_threads(machine.cores())
        self.workload, self.device = workload, torch.device(machine.device_type())
        if self.device.type == "cuda":
            there = torch.cuda.get_device_properties(self.device).total_memory
            if there < workload.memory:
                raise NotHereError(f"needs {workload.memory / 1e9:.0f} GB, this GPU has {there / 1e9:.0f}")
        self.step = steps.make_step(name, workload.config, self.device)
        self.dtype = torch.bfloat16 if "bf16" in name else torch.float32
        self.done = 0

    def run(self, count: int) -> tuple[list[float], list[float]]:
        """-> seconds and loss of each of the next `count` steps; the loss has been read, so the device is done."""
        batches = [[ids.to(self.device) for ids in batch_of(self.workload, self.done + i)] for i in range(count)]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        times, losses = [time.perf_counter()], []
        for batch in batches:
            losses.append(self.step(*batch))
            times.append(time.perf_counter())
        self.done += count
        seconds = [end - start for start, end in itertools.pairwise(times)]
        self.profiled = 2 if seconds[-1] < 1 else 1  # steps; long ones need no mean
        return seconds, losses

    def rates(self) -> tuple[float, float]:
        """FLOP/s of this precision's matmul, and what MFU divides by."""
        measured = machine.matmul_rate(self.dtype, self.device, 0.5)
        return measured, machine.peak_rate(self.dtype, self.device)[0] if self.device.type == "cuda" else measured

    def peak_bytes(self) -> int:
        return machine.peak_memory(self.device)

    def profile(self) -> dict[str, Any]:
        batch = [ids.to(self.device) for ids in batch_of(self.workload, self.done)]
        return breakdown(lambda: self.step(*batch), self.profiled)


def measure(workload: Workload, names: tuple[str, ...], deadline: float) -> dict[str, Any]:
    """Results of a workload as train.json keeps them; what fails or is not here is a row that says so."""
    first, others = names[0], list(names[1:])
    rows: dict[str, dict[str, Any]] = {}
    width = max(1, workload.at_once - 1)
    groups = [others[i : i + width] for i in range(0, len(others), width)] or [[]]
    share = (deadline - time.monotonic()) / len(groups)
    baseline = Contestant(Training, first, workload)
    try:
        for number, group in enumerate(groups):
            until = deadline - share * (len(groups) - 1 - number)
            rows |= _measure_together(workload, baseline, group, until, rows)
    finally:
        baseline.end()
    ordered = [rows[name] for name in names if name in rows]
    found = [goal(ordered, *each, "tokens_per_second") for each in workload.goals]
    shape = {**steps.plain_shape(workload.config), "parameters": mk_parameters(workload.config)}
    return {"name": workload.name, "model": shape, "batch": workload.batch, "rows": ordered,
            "goals": [each for each in found if each]}  # fmt: skip


def mk_parameters(config: mk.GPTConfig) -> int:
    from megakern.model.gpt import parameter_count

    return parameter_count(config)


def _measure_together(workload, baseline: Contestant, names: list[str], deadline: float, before) -> dict[str, Any]:
    """Rows of the contestants that take turns; the baseline's own row is that of its first group."""
    rows: dict[str, dict[str, Any]] = {}
    contestants = [baseline, *(Contestant(Training, name, workload) for name in names)]
    slowest, ready, expected = 0.0, [], before.get(baseline.name, {}).get("losses")
    try:
        for contestant in contestants:
            row = rows[contestant.name] = {"contestant": contestant.name}
            if contestant is not baseline and time.monotonic() > deadline:
                row["missing"] = "no time left"
                continue
            try:
                if contestant is not baseline or not before:  # else it is warm, and further on
                    seconds, row["losses"] = contestant.call("run", 3)
                    slowest = max(slowest, seconds[-1])  # the first may have compiled
                    print(
                        f"{workload.name}, {contestant.name}: {seconds[-1]:.2f} s a step", file=sys.stderr, flush=True
                    )
                    expected = expected or row["losses"]
                    if wrong := _disagreement(contestant.name, row["losses"], expected):
                        row["error"] = wrong
                        continue
                ready.append(contestant)
            except NotHereError as reason:
                row["missing"] = str(reason)
            except FailedError as error:
                row["error"] = str(error)
        timed = _turns(ready, slowest, deadline)
        for contestant in ready:
            rows[contestant.name] |= _figures(workload, contestant, timed, baseline.name)
        return rows if not before else rows | {baseline.name: before[baseline.name]}
    finally:
        for contestant in contestants[1:]:
            contestant.end()


def _disagreement(name: str, losses: list[float], others: list[float]) -> str | None:
    """Losses of the first step are of the same weights; those of the third have the updates in them."""
    for step, limits in ((0, (1e-5, 2e-3)), (2, (1e-3, 1e-2))):
        limit = limits["bf16" in name]
        if not abs(losses[step] - others[step]) <= limit * others[step]:
            return f"loss {losses[step]:.6f} at step {step + 1}, the first contestant has {others[step]:.6f}"
    return None


def _turns(ready: list[Contestant], slowest: float, deadline: float) -> dict[str, list[float]]:
    """Seconds a step, turn by turn, until time is up: one turn or more, of a step or two thirds of a second."""
    each = max(1, min(8, int(0.67 / max(slowest, 1e-9))))
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in ready}
    reserve = 6 * slowest + 3  # profiles and rates come after
    while ready and (not seconds[ready[0].name] or time.monotonic() < deadline - reserve):
        started = time.monotonic()
        for contestant in ready:
            seconds[contestant.name].append(statistics.fmean(contestant.call("run", each)[0]))
        reserve = 6 * slowest + 3 + time.monotonic() - started
        if len(seconds[ready[0].name]) >= MOST_TURNS:
            break
    return seconds


def _figures(workload: Workload, contestant: Contestant, timed: dict[str, list[float]], first: str) -> dict[str, Any]:
    tokens = workload.batch * workload.config.sequence_length
    own = timed[contestant.name]
    middle = statistics.median(own)
    measured, peak = contestant.call("rates")
    causal, full = (flops_per_token(workload.config, causal=kind) for kind in (True, False))
    row = {
        "ms": middle * 1e3,
        "fastest_ms": min(own) * 1e3,
        "slowest_ms": max(own) * 1e3,
        "turns": len(own),
        "tokens_per_second": tokens / middle,
        "ratio_to_first": ratio_to(timed[first], own) if first in timed else None,
        "mfu_causal": tokens * causal / middle / peak,
        "mfu_full": tokens * full / middle / peak,
        "matmul_flops": measured,
        "matmul_floor_ms": tokens * causal / measured * 1e3,
        "peak_bytes": contestant.call("peak_bytes"),
    }
    if "compiled" not in contestant.name or torch.cuda.is_available():  # on a CPU its ops have no names of their own
        row["breakdown"] = contestant.call("profile")
    return row


def main(arguments: list[str] | None = None) -> int:
    return run(__doc__, WORKLOADS, 400.0, QUICK, arguments)


def run(doc: str, all_workloads: dict[str, tuple[Workload, ...]], seconds: float, quick: tuple[str, ...],
        arguments: list[str] | None) -> int:  # fmt: skip
    """The command: measures this device's workloads one after the other; of a quick run the first, of those in `quick`.

    Returns the exit code. Shared with bench_patch."""
    workloads = {workload.name: workload for workload in all_workloads[machine.device_type()]}
    less = f"the first workload, of {', '.join(quick)}"
    parser = part_parser(doc, seconds=seconds, until="no turn begins after that, but the first", quick=less)
    parser.add_argument("--workload", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants; ratios divide by the first")
    options = begin_part(parser, arguments)
    results: list[dict[str, Any]] = []
    chosen = [workloads[name] for name in options.workload][: 1 if options.quick else None]
    for number, workload in enumerate(chosen):
        names = tuple(options.only or workload.contestants)
        if unknown := set(names) - set(workload.contestants):
            known = ", ".join(workload.contestants)
            parser.error(f"--only: {', '.join(sorted(unknown))}: no contestant; there are {known}")
        if options.quick and not options.only:
            names = tuple(name for name in names if name in quick) or names[:2]
        shares = [each.share for each in chosen]
        deadline = options.deadline - options.seconds * (1 - sum(shares[: number + 1]) / sum(shares))
        results.append(measure(workload, names, deadline))
        # After each, as the next may be ended.
        end_part(options, {"workloads": results}, lambda found: report.train_table(found["workloads"][-1]))
    return 1 if any(report.failures(result["rows"]) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
