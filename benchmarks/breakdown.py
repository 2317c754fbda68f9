"""Where the time of a call goes: attention, matrix products, norms, loss, optimizer, communication, the rest, and idle.

From torch.profiler: on a GPU the time of kernels, by name; on a CPU the own time of ops, this package's among them.
"idle" is the wall time in which none of them ran: on a CPU Python's own, on a GPU that of a device without work. The
profiler itself slows small ops down; sums are of the profiled call, not of the timed ones.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.timing import profiled

# The first that matches the name of a kernel or op counts.
KINDS = (
    ("communication", r"nccl|gloo|c10d|^shared memory|all_?reduce|all_?gather|reduce_?scatter|broadcast_(?!tensors)"),
    ("optimizer", r"adam|_foreach|multi_tensor|vector_norm|grad_?norm|norm_squares|clip|squares|\btotal_kernel"),
    ("loss", r"cross_?entropy|nll_loss|log_softmax|\bscale_kernel"),
    ("attention", r"attention|attn|flash|fmha|sdpa|softmax|backward_(rows|dq)_kernel"),
    ("norms", r"norm|sum_parts"),
    ("embedding", r"embedding|index_select|index_put|gather"),
    ("GEMM", r"gemm|addmm|::b?mm|matmul|linear|cutlass|nvjet|xmma|product|mkldnn|dnnl|cublas|column_sums|part_sums"),
)
_PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS]
REST, IDLE = "elementwise and copies", "idle"


def kind_of(name: str) -> str:
    """The part of a step that a kernel or op belongs to, by its name."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), REST)


def breakdown(step: Callable[[], Any], steps: int = 2) -> dict[str, Any]:
    """Profile `step` and return {"ms": {kind: ms a step}, "longest": [(name, ms)], "wall_ms"}. Warm it up before."""
    gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profiled(*activities) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    if gpu:
        events = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not _is_annotation(e)]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
        busy = _union((start, end) for _, start, end in spans) / 1e6
        times = ((name, (end - start) / 1e6) for name, start, end in spans)
    else:
        times = [(e.key, e.self_cpu_time_total / 1e6) for e in profile.key_averages()]
        busy = sum(seconds for _, seconds in times)
    return summary(times, busy, wall, steps)


def _is_annotation(event) -> bool:
    """Ranges that the profiler, the compiler or a library marked, which are no kernels."""
    marked = ("ProfilerStep", "Optimizer.", "Torch-Compiled", "CompiledFunction", "## ", "nccl:")
    return event.is_user_annotation or event.name.startswith(marked)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summary(times: Iterable[tuple[str, float]], busy: float, wall: float, steps: int) -> dict[str, Any]:
    """(name, seconds) of `steps` steps -> milliseconds a step by kind, and the ten longest names."""
    kinds: dict[str, float] = {kind: 0.0 for kind, _ in KINDS} | {REST: 0.0}
    names: dict[str, float] = defaultdict(float)
    for name, seconds in times:
        kinds[kind_of(name)] += seconds
        names[name] += seconds
    kinds[IDLE] = max(0.0, wall - busy)
    longest = sorted(names.items(), key=lambda item: -item[1])[:10]
    per = 1e3 / steps
    return {
        "ms": {kind: seconds * per for kind, seconds in kinds.items()},
        "longest": [(name[:60], seconds * per) for name, seconds in longest],
        "wall_ms": wall * per,
    }
