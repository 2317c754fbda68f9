"""A training step of a Hugging Face model, as it is, compiled, and after `mk.patch`, in tokens a second.

    python -m benchmarks.bench_patch [--workload NAME ...] [--only NAME ...] [--seconds N] [--quick] [--json FILE]

The same models, weights, batches and optimizer for all; contestants and columns are those of bench_train. "patched" has
the loss that makes no logits; the others make them, and take PyTorch's cross-entropy of them. megakern's own model of
the same shape, with its own optimizer, comes last.
"""

from __future__ import annotations

import dataclasses
import sys

import megakern as mk
from benchmarks.bench_train import LLAMA, Workload, gpt2, run

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
    return run(__doc__, WORKLOADS, 240.0, HERE[:2], arguments)


if __name__ == "__main__":
    sys.exit(main())
