"""A training step of a Hugging Face model, as it is, compiled, and after `mk.patch`, in tokens a second.

    python -m benchmarks.bench_patch [--workload NAME ...] [--only NAME ...] [--seconds N] [--json FILE]

The same models, weights, batches and optimizer for all; contestants and columns are those of bench_train. "patched" has
the loss that makes no logits; the others make them, and take PyTorch's cross-entropy of them. megakern's own model of
the same shape, with its own optimizer, comes last.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import megakern as mk
from benchmarks import report
from benchmarks.bench_train import LLAMA, Workload, gpt2, measure
from benchmarks.common import describe_machine, write_results
from megakern.train import machine

HERE = ("transformers fp32", "transformers fp32 patched", "transformers bf16 autocast",
        "transformers bf16 autocast patched", "transformers bf16 compiled", "megakern fp32")  # fmt: skip
ON_GPU = ("transformers bf16 autocast", "transformers bf16 autocast patched", "transformers bf16 compiled",
          "transformers bf16 compiled patched", "megakern bf16")  # fmt: skip
SMALL = {"layers": 6, "width": 384, "heads": 6, "sequence_length": 256}
SMALL_LLAMA = dataclasses.replace(mk.presets["tiny-llama"], kv_heads=2, ffn_size=1024, vocab_size=8192, **SMALL)
WORKLOADS = {
    "cpu": (
        Workload("a small Llama", SMALL_LLAMA, 8, HERE),
        Workload("a small GPT-2", gpt2("gpt2-124m", vocab_size=8192, **SMALL), 8, HERE),
    ),
    "cuda": (
        Workload("GPT-2 124M", gpt2("gpt2-124m"), 32, ON_GPU, at_once=3),
        Workload("Llama 3 8B, 4 layers", LLAMA, 2, ON_GPU, at_once=2),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    workloads = {workload.name: workload for workload in WORKLOADS[machine.device_type()]}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants; ratios divide by the first")
    parser.add_argument("--seconds", type=float, default=240.0, help="no turn begins after that, but the first")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    started, results = time.monotonic(), []
    print(describe_machine(), flush=True)
    for number, name in enumerate(options.workload, 1):
        deadline = started + options.seconds * number / len(options.workload)
        names = tuple(options.only or workloads[name].contestants)
        results.append(measure(workloads[name], names, deadline))
        print(f"\n{report.train_table(results[-1])}", flush=True)
    if options.json:
        write_results(options.json, {"workloads": results})
    return 1 if any(report.failures(result["rows"]) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
