"""How the cost of an op grows: sizes in steps of ten, the exponent of time and of memory, and what it should be.

    python -m benchmarks.bench_growth [--only NAME ...] [--seconds N] [--quick] [--json FILE]

The exponent is the slope of log time over log size: over all sizes, where a fixed cost makes it small, and over the
last step of ten, which is judged. A wrong complexity (a loop over all earlier tokens, a copy of everything for each
part) shows as an exponent that is MARGIN above what is expected.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megakern as mk
from benchmarks import report
from benchmarks.common import begin_part, end_part, part_parser
from benchmarks.timing import CpuClock, CudaClock
from megakern.ops.dropout import dropout
from megakern.train import machine

MARGIN = 0.35  # caches that overflow and threads that begin to pay move an exponent by as much
MEMORY_MARGIN = 0.1
Call = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """An op whose cost depends on one size; `make(size)` gives a call on inputs of that size."""

    op: str
    by: str
    make: Callable[[int], Call]
    sizes: tuple[int, ...]
    expected: float = 1.0
    """Exponent of time; that of memory is 1 at most, whatever this is: no op may hold a square of anything."""


def _random(*shape: int, gradient: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=machine.device_type()).requires_grad_(gradient)


def _both(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Call:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(*inputs).sum(), [x for x in inputs if x.requires_grad])


def _norm(rows: int) -> Call:
    return _both(mk.rms_norm, _random(rows, 256), _random(256))


def _linear(rows: int) -> Call:
    return _both(mk.linear, _random(rows, 256), _random(256, 256))


def _attention(T: int) -> Call:
    return _both(mk.attention, *(_random(1, T, 2, 64) for _ in range(3)))


def _window(T: int) -> Call:
    return _both(lambda *x: mk.attention(*x, window=(64, 0)), *(_random(1, T, 2, 64) for _ in range(3)))


def _decode(S: int) -> Call:
    q, cache = _random(1, 1, 8, 64, gradient=False), _random(-(-S // 256), 256, 2, 64, gradient=False)
    table = torch.arange(cache.shape[0], device=q.device, dtype=torch.int32)[None]
    lengths = torch.tensor([S], device=q.device, dtype=torch.int32)
    return lambda: mk.paged_attention(q, cache, cache, table, lengths)


def _vocabulary(V: int) -> Call:
    targets = torch.randint(0, V, (64,), device=machine.device_type())
    return _both(lambda x: mk.cross_entropy(x, targets), _random(64, V))


def _head(M: int) -> Call:
    targets = torch.randint(0, 4096, (M,), device=machine.device_type())
    return _both(lambda x, w: mk.linear_cross_entropy(x, w, targets), _random(M, 64), _random(4096, 64))


def _rope(T: int) -> Call:
    angle = torch.outer(torch.arange(T), torch.rand(32)).to(machine.device_type())
    q = _random(1, T, 4, 64)
    return _both(lambda q: mk.rope(q, q, angle.cos(), angle.sin())[0], q)


def _parameters(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    parameters = [_random(*shape) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _adamw(shapes: list[tuple[int, ...]]) -> Call:
    parameters = _parameters(shapes)
    return mk.AdamW(parameters, lr=1e-3).step


def _clip(tensors: int) -> Call:
    parameters = _parameters([(64,)] * tensors)
    return lambda: mk.clip_grad_norm_(parameters, 1.0)


def _model(layers: int) -> Call:
    """A model's step of construction, forward and backward over its depth."""
    model = mk.GPT(mk.GPTConfig(layers=layers, width=32, heads=2, vocab_size=128, sequence_length=32))
    ids = torch.randint(0, 128, (1, 32), device=next(model.parameters()).device)
    return lambda: model(ids, ids).backward()


def _encode(characters: int) -> Call:
    from megakern.data.tokenizer import Tokenizer

    tokenizer, text = Tokenizer.load("bytes"), "some words, again and again. " * (characters // 29)
    return lambda: tokenizer.encode(text)


def _prepare(documents: int) -> Call:
    from megakern.data.prepare import prepare

    kept = tempfile.TemporaryDirectory()  # lives as long as the call
    text = Path(kept.name, "text.jsonl")
    text.write_text("".join(f'{{"text": "document {i} of some"}}\n' for i in range(documents)))
    return lambda: prepare([text], Path(kept.name, "data"), tokenizer="bytes", overwrite=True)


GROWTHS = (
    Growth("rms_norm", "rows", _norm, (1_000, 10_000, 100_000)),
    Growth("linear", "rows", _linear, (1_000, 10_000, 100_000)),
    Growth("attention, causal", "tokens", _attention, (100, 1_000, 10_000), expected=2.0),
    Growth("attention, window of 64", "tokens", _window, (100, 1_000, 10_000)),
    Growth("attention of one token", "keys", _decode, (1_000, 10_000, 100_000)),
    Growth("cross_entropy", "vocabulary", _vocabulary, (1_000, 10_000, 100_000)),
    Growth("linear_cross_entropy", "rows", _head, (100, 1_000, 10_000)),
    Growth("rope", "tokens", _rope, (1_000, 10_000, 100_000)),
    Growth("swiglu", "elements", lambda n: _both(mk.swiglu, _random(n), _random(n)), (10_000, 100_000, 1_000_000)),
    Growth("dropout", "elements", lambda n: _both(lambda x: dropout(x, 0.1, 7), _random(n)),
           (10_000, 100_000, 1_000_000)),
    Growth("AdamW", "parameters", lambda n: _adamw([(n,)]), (100_000, 1_000_000, 10_000_000)),
    Growth("AdamW, small tensors", "tensors", lambda n: _adamw([(64,)] * n), (10, 100, 1_000)),
    Growth("clip_grad_norm_, small tensors", "tensors", _clip, (10, 100, 1_000)),
    Growth("GPT, forward and backward", "layers", _model, (1, 10, 100)),
    Growth("tokenizer", "characters", _encode, (10_000, 100_000, 1_000_000)),
    Growth("prepare", "documents", _prepare, (100, 1_000, 10_000)),
)  # fmt: skip


def slopes(sizes: tuple[int, ...], costs: list[float]) -> tuple[float, float]:
    """(exponent over all sizes by least squares, exponent of the last step)."""
    x, y = [math.log(size) for size in sizes], [math.log(max(cost, 1e-12)) for cost in costs]
    fitted = statistics.linear_regression(x, y).slope
    return fitted, (y[-1] - y[-2]) / (x[-1] - x[-2])


def measure_one(growth: Growth, sizes: tuple[int, ...], patience: float) -> dict[str, Any]:
    """A row of growth.json: the fastest of the turns counts, as what disturbs a turn only makes it longer."""
    clock = CudaClock() if torch.cuda.is_available() else CpuClock(3, patience)
    seconds, memory = [], []
    for size in sizes:
        call = growth.make(size)
        call()
        seconds.append(min(clock.take_turns({"": call})[""].seconds))
        memory.append(clock.peak_bytes(call))
    fitted, last = slopes(sizes, seconds)
    _, held = slopes(sizes, [max(1, count) for count in memory])
    verdicts = []
    if last > growth.expected + MARGIN:
        verdicts.append(f"TIME grows by {last:.2f}")
    if memory[-1] > 1e6 and held > 1 + MEMORY_MARGIN:
        verdicts.append(f"MEMORY grows by {held:.2f}")
    return {
        "op": growth.op,
        "by": growth.by,
        "sizes": list(sizes),
        "ms": [each * 1e3 for each in seconds],
        "peak_bytes": memory,
        "exponent": fitted,
        "last_exponent": last,
        "memory_exponent": held,
        "expected": growth.expected,
        "verdict": "; ".join(verdicts) or "as expected",
    }


def measure(growths: tuple[Growth, ...], deadline: float, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of growth.json. A quick run leaves the largest size out."""
    for growth in growths:
        if time.monotonic() > deadline:
            print(f"{growth.op}: LEFT OUT, no time left", flush=True)
        else:
            yield measure_one(growth, growth.sizes[:-1] if quick else growth.sizes, 0.05 if quick else 0.3)


def main(arguments: list[str] | None = None) -> int:
    parser = part_parser(__doc__, seconds=60.0, until="no op begins after that", quick="without the largest sizes")
    parser.add_argument("--only", nargs="+", choices=[growth.op for growth in GROWTHS], metavar="NAME")
    options = begin_part(parser, arguments)
    machine.keep_freed_memory()
    chosen = tuple(growth for growth in GROWTHS if options.only is None or growth.op in options.only)
    results = {"rows": list(measure(chosen, options.deadline, quick=options.quick))}
    end_part(options, results, report.growth_table)
    return 1 if any(row["verdict"] != "as expected" for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
