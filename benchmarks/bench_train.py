"""A whole training step: megakern against a plain PyTorch GPT, on this machine, in tokens a second.

    python -m benchmarks.bench_train [--only NAME ...] [--rounds N] [--steps N] [--json FILE]

Peers are `peers/plain_gpt.py` as nanoGPT runs by default (fp32, eager) and with bf16 autocast; on a GPU with bf16
autocast, eager and compiled. Each contestant is a process of its own with all cores, since memory settings are
process-wide; they take turns, one round each, so that a drift of the machine's speed meets all of them. First all run
one step from the same weights on the same batch, and the losses must agree. The last column divides the matmuls of a
step by this machine's measured matmul rate: no step can be faster than that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}


@dataclass(frozen=True)
class Setting:
    """What is trained on one kind of device, and by whom; the ratios divide by the first contestant."""

    model: dict
    batch: int
    contestants: tuple[str, ...]


SETTINGS = {
    "cpu": Setting(
        {"layers": 6, "width": 384, "heads": 6, "vocab_size": 1024, "sequence_length": 256},
        12,
        ("plain fp32", "plain bf16 autocast", "megakern fp32", "megakern bf16"),
    ),
    "cuda": Setting(  # GPT-2 124M, its vocabulary rounded up as nanoGPT does
        {"layers": 12, "width": 768, "heads": 12, "vocab_size": 50304, "sequence_length": 1024},
        32,
        ("plain bf16 autocast", "plain bf16 compiled", "megakern bf16"),
    ),
}


def batch_of(setting: Setting, step: int):
    import torch

    generator = torch.Generator().manual_seed(step)
    shape = (setting.batch, setting.model["sequence_length"] + 1)
    ids = torch.randint(0, setting.model["vocab_size"], shape, generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def serve(name: str, device_type: str, connection) -> None:
    """Take orders ("run", steps) -> (seconds, last loss); ("rate",) -> FLOP/s of this precision's matmul."""
    import torch

    from megakern.train import machine

    torch.set_num_threads(machine.cores())
    setting, device = SETTINGS[device_type], torch.device(device_type)
    step = (plain_step if name.startswith("plain") else our_step)(name, setting.model, device)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    done = 0
    while True:
        order = connection.recv()
        if order is None:
            return
        if order[0] == "rate":
            connection.send(machine.matmul_rate(dtype, device, 0.5))
            continue
        batches = [[ids.to(device) for ids in batch_of(setting, done + i)] for i in range(order[1])]
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for tokens, targets in batches:
            loss = step(tokens, targets)
        connection.send((time.perf_counter() - start, loss))  # the loss has been read: the device is done
        done += order[1]


def plain_step(name: str, shape: dict, device):
    import contextlib

    import torch

    from benchmarks.peers.plain_gpt import PlainGPT

    model = PlainGPT(**shape)
    model.load_state_dict(plain_weights(shape))
    model.to(device)
    optimizer = model.make_optimizer(**ADAMW)
    forward = torch.compile(model) if "compiled" in name else model
    bf16 = "bf16" in name

    def step(tokens, targets) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def plain_weights(shape: dict) -> dict:
    """The same start for all: the plain model's weights from a fixed seed."""
    import torch

    from benchmarks.peers.plain_gpt import PlainGPT

    torch.manual_seed(0)
    return PlainGPT(**shape).state_dict()


def our_step(name: str, shape: dict, device):
    import torch

    import megakern as mk
    from megakern.ops.grad_norm import clip_coefficient, gradient_norm
    from megakern.train import machine

    machine.keep_freed_memory()
    config = mk.GPTConfig(**shape, activation="gelu", vocab_multiple=1)
    compute_dtype = torch.bfloat16 if "bf16" in name else torch.float32
    model = mk.GPT(config, compute_dtype=compute_dtype, device=device)
    copy_weights(plain_weights(shape), model, shape)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = mk.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"])

    def step(tokens, targets) -> float:
        loss = model(tokens, targets)
        loss.backward()
        norm = gradient_norm(parameters)
        optimizer.step(grad_scale=clip_coefficient(norm, 1.0) if norm.item() > 1.0 else None)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def copy_weights(plain: dict, model, shape: dict) -> None:
    """Plain's fused [all q; all k; all v] rows become [q, k, v] for each head."""
    import torch

    heads, D = shape["heads"], shape["width"] // shape["heads"]

    def grouped(rows):
        return rows.view(3, heads, D, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    names = {"tokens.weight": "embedding.weight", "positions.weight": "positions.weight"}
    parts = {"attention.qkv": "attention.qkv", "attention.proj": "attention.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    parts |= {"norm1": "norm1", "norm2": "norm2"}
    for layer in range(shape["layers"]):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{theirs}.{kind}"] = f"blocks.{layer}.{ours}.{kind}"
    names |= {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    ours = dict(model.named_parameters())
    assert sorted(names.values()) == sorted(ours), sorted(set(names.values()) ^ set(ours))
    with torch.no_grad():
        for theirs, mine in names.items():
            value = plain[theirs]
            ours[mine].copy_(grouped(value) if ".qkv." in mine else value)


def main() -> None:
    from megakern.train import machine

    device_type = machine.device_type()
    setting = SETTINGS[device_type]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--only", nargs="+", choices=setting.contestants, default=list(setting.contestants))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    baseline = setting.contestants[0]
    if options.only[0] != baseline:
        parser.error(f"--only must begin with {baseline!r}, which the ratios divide by")
    from benchmarks.common import describe_machine, write_results
    from megakern.config import GPTConfig
    from megakern.model.flops import flops_per_token

    print(describe_machine())
    print(f"model {setting.model}, batch {setting.batch}, AdamW and clipping included\n")
    workers = {}
    for name in options.only:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(name, device_type, theirs), daemon=True
        )
        process.start()
        workers[name] = ours

    def ask(name: str, *order):
        workers[name].send(order)
        return workers[name].recv()

    first = {name: ask(name, "run", 1)[1] for name in workers}
    base = first[baseline]
    for name, loss in first.items():
        limit = 1e-5 if "fp32" in name else 2e-3
        if abs(loss - base) > limit * base:
            sys.exit(f"{name}: first loss {loss:.6f}, {baseline} {base:.6f}: not the same model")
    for name in workers:
        ask(name, "run", 2)  # warm-up: allocator, optimizer states
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name in workers:
            seconds[name].append(ask(name, "run", options.steps)[0] / options.steps)
    tokens = setting.batch * setting.model["sequence_length"]
    flops = flops_per_token(GPTConfig(**setting.model, vocab_multiple=1), causal=True)
    print(f"{'contestant':<22}{'ms a step':>10}{'spread':>14}{'tokens/s':>10}{'x plain':>9}{'matmul floor':>14}")
    rows = []
    for name, times in seconds.items():
        rate = ask(name, "rate")
        ratios = [other / own for other, own in zip(seconds[baseline], times, strict=True)]
        row = {
            "contestant": name,
            "ms": statistics.median(times) * 1e3,
            "fastest_ms": min(times) * 1e3,
            "slowest_ms": max(times) * 1e3,
            "tokens_per_second": tokens / statistics.median(times),
            "ratio_to_first": statistics.median(ratios),
            "matmul_flops": rate,
            "matmul_floor_ms": tokens * flops / rate * 1e3,
        }
        rows.append(row)
        print(
            f"{name:<22}{row['ms']:>10.0f}{row['fastest_ms']:>7.0f}-{row['slowest_ms']:<6.0f}"
            f"{row['tokens_per_second']:>10,.0f}{row['ratio_to_first']:>9.2f}{row['matmul_floor_ms']:>11.0f} ms"
        )
    if options.json:
        write_results(options.json, {"model": setting.model, "batch": setting.batch, "rows": rows})
    for connection in workers.values():
        connection.send(None)


if __name__ == "__main__":
    main()
