"""Every plan of the C++ cross-entropy and AdamW kernels, timed on a GPU one after another: for the tables in
megakern/kernels/cuda/{cross_entropy,adamw}.py.

    python -m benchmarks.tune_loss [--shape 8192x131072 ...] [--parameters 300000000] [--json FILE]

Cross-entropy in bf16: bytes are 2 an element for the loss, 4 for loss and gradient at once (the gradient goes to a
tensor of its own, so that the logits stay random). AdamW: 28 a parameter in fp32, 20 with bf16 moments.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import describe_machine, machine_facts, sizes
from benchmarks.timing import CudaClock
from megakern.kernels.cuda import adamw, cross_entropy
from megakern.kernels.torch.cross_entropy import Shard
from megakern.kernels.triton import cross_entropy as triton

RATES = (0.999, 0.9, 0.95, 1e-8, 0.1)  # lr, beta1, beta2, eps, weight_decay of a step


def loss_calls(logits, targets):
    """The loss alone: threads of a block, one a row."""
    options = (-100, 0.0, 0.0, logits.shape[1], Shard(None, 0, logits.shape[1]))
    calls = {"triton": lambda: triton.row_losses(logits, targets, *options)}
    for threads in (128, 256, 512):
        plan = ("threads_for", lambda chunks, threads=threads: threads)
        calls[f"{threads} threads"] = with_plan(*plan, cross_entropy.row_losses, logits, targets, *options)
    return calls


def both_calls(logits, out, targets):
    """Loss and gradient: threads, chunks held and kept, blocks a multiprocessor."""
    M, V = logits.shape
    options = (-100, 0.0, 0.0, V, Shard(None, 0, V))
    count, shared = cross_entropy.chip(logits.device)
    chunks = V * logits.element_size() // 16
    arguments = (out, None, logits, targets, *options)

    def apart():
        _, lse = cross_entropy.row_losses(logits, targets, *options)
        cross_entropy.write_gradient(out, None, logits, targets, lse, *options)

    calls = {"chosen": lambda: cross_entropy.loss_and_gradient(*arguments), "two kernels": apart}
    for threads, held, together in itertools.product((128, 256, 512), (0, cross_entropy.HELD), (1, 2, 3, 4, 8)):
        steps = -(-chunks // threads)
        room = (shared // together - cross_entropy.SUMS_BYTES - 1024) // (
            16 * threads
        )  # 1 KB of each block is the driver's
        kept = max(0, min(steps - held, room))
        if threads * together > (512 if held else 1024) or (held + kept) * 2 < steps:
            continue
        for ahead in sorted({0, min(1, room - kept), min(kept, room - kept)}) if kept else (0,):
            plan = cross_entropy.Plan(threads, held, kept, ahead, min(count * together, M), 0.0)
            calls[f"{threads} threads, {held} + {kept} chunks of {steps}, {ahead} ahead, {together} blocks"] = (
                with_plan("plan", lambda *_, plan=plan: plan, cross_entropy.loss_and_gradient, *arguments)
            )
    return calls


def with_plan(name, value, function, *arguments):
    def call():
        with mock.patch.object(cross_entropy, name, value):
            return function(*arguments)

    return call


def step_calls(parameters: int, moment: torch.dtype, device):
    param, grad = (torch.randn(parameters, device=device) for _ in range(2))
    moments = [torch.rand(parameters, device=device).to(moment) for _ in range(2)]
    lists = [[param], [grad], *([m] for m in moments)]

    def step(piece):
        def call():
            with mock.patch.object(adamw, "piece_of", lambda elements: piece):
                adamw.adamw(*lists, [], None, False, 5, *RATES)

        return call

    return {f"pieces of {piece}": step(piece) for piece in (1024, 2048, 4096, 8192, 16384, 32768, 65536)}


def report(what: str, calls, moved: float, clock: CudaClock, limit: float) -> list[dict]:
    print(f"\n{what}")
    rows = []
    for name, times in clock.take_turns(calls).items():
        share = moved / times.median / limit
        print(f"  {name:<52}{times.median * 1e6:>10.1f} us{share:>8.1%}")
        rows.append({"what": what, "plan": name, "us": times.median * 1e6, "share_of_limit": share})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every plan of the C++ cross-entropy and AdamW kernels.")
    parser.add_argument("--shape", nargs="+", default=["8192x131072", "16384x32000"])
    parser.add_argument("--parameters", type=int, default=300_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    print(describe_machine())
    clock = CudaClock()
    clock.FEWEST = 5
    limit = clock.limits(torch.bfloat16)["B"]
    print(f"copy: {limit / 1e12:.2f} TB/s")
    rows = []
    for shape in options.shape:
        M, V = sizes(shape)
        logits = torch.randn(M, V, device=device, dtype=torch.bfloat16)
        out, targets = torch.empty_like(logits), torch.randint(0, V, (M,), device=device)
        rows += report(f"loss {shape}", loss_calls(logits, targets), 2.0 * M * V, clock, limit)
        rows += report(f"loss and gradient {shape}", both_calls(logits, out, targets), 4.0 * M * V, clock, limit)
        del logits, out
    for moment, work in ((torch.float32, 28.0), (torch.bfloat16, 20.0)):
        calls = step_calls(options.parameters, moment, device)
        rows += report(f"AdamW, moments in {moment}", calls, work * options.parameters, clock, limit)
        del calls
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine_facts(), "copy": limit, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
