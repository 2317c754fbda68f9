"""How a call is timed, from a cold cache: on a CPU by the host's clock; on a GPU by events, with no gaps of Python's.

All contestants take turns, so that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megakern.train import machine

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """What the turns of one contestant took."""

    seconds: list[float]
    """Of each turn, in order: on a GPU the time between its first and its last kernel."""
    launch: float | None
    """Seconds until the call returns, the GPU not waited for: what it costs the CPU. None on a CPU."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class CpuClock:
    """Host clock around one call at a time. Before each a buffer is read: inputs come from memory, and the threads of
    the pool are awake, for each contestant alike.

    The buffer is twice the last cache, at most 256 MB (17 ms to read): the third level of a server can be larger, 480
    MB on one that was asked, and is shared with other machines; how much of it stays ours nobody can say.
    """

    MOST = 30  # turns, unless more were asked for
    LARGEST = 256 << 20

    def __init__(self, rounds: int, seconds: float = 0.3) -> None:
        """At least `rounds` turns of each contestant, and as many as the slowest one makes in `seconds`, reading the
        buffer included."""
        self.rounds, self.seconds = rounds, seconds
        self._buffer = torch.ones(min(self.LARGEST, 2 * last_cache()) // 4)

    def take_turns(self, calls: dict[str, Call]) -> dict[str, Times]:
        once = max(self._seconds(call) for call in calls.values()) + self._seconds(self._buffer.sum)
        rounds = max(self.rounds, min(self.MOST, int(self.seconds / once)))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                self._buffer.sum()
                seconds[name].append(self._seconds(call))
        return {name: Times(turns, None) for name, turns in seconds.items()}

    @staticmethod
    def _seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @staticmethod
    def peak_bytes(call: Call) -> int:
        """Most that a call holds beyond what was there, its results too: what PyTorch's allocator gave, not malloc."""
        with profiled(torch.profiler.ProfilerActivity.CPU, profile_memory=True) as found:
            kept = call()
        del kept
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        return max(0, *held, 0)

    def limits(self, dtype: torch.dtype) -> dict[str, float]:
        """Bytes/s of a copy of 64 MB and FLOP/s of a matmul, the best of some."""
        source = torch.ones(16 << 20)
        target = torch.empty_like(source)
        copy = min(self._seconds(lambda: target.copy_(source)) for _ in range(10))
        return {"B": 2 * source.nbytes / copy, "FLOP": machine.matmul_rate(dtype, source.device, 0.5)}


def profiled(*activities, **options):
    """torch.profiler.profile without kineto's remarks on the terminal, which it makes from torch 2.13 on."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return torch.profiler.profile(activities=activities, **options)


def last_cache() -> int:
    """Bytes of this processor's largest cache; 32 MB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    told = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in told if text[-1:] in units), default=32 << 20)


class CudaClock:
    """Events around one call at a time, as far as the GPU is concerned back to back.

    Before each call the GPU reads a buffer larger than its L2 cache: inputs come from memory, and what earlier calls
    left to be written back is gone (writing the buffer would leave its own lines to be written back within the call).
    Then it spins until the CPU has certainly queued all of the call, so that no time of Python's is measured.
    """

    SECONDS = 0.15  # of each contestant's calls, between FEWEST and MOST of them
    FEWEST, MOST = 7, 60

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.ones(4 * cache // 4, device=device)
        self._buffer.sum()
        spun = self._between(lambda: torch.cuda._sleep(20_000_000))
        self._cycles = 20_000_000 / spun  # a second; clocks may rise later, hence the margin in _delay
        self._cool = self._between(self._buffer.sum)

    @staticmethod
    def _between(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    @staticmethod
    def launch_cost(call: Call) -> float:
        """Median seconds of the CPU for one call, the queue being empty."""
        seconds = []
        for _ in range(11):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(seconds)

    @staticmethod
    def peak_bytes(call: Call) -> int:
        """Most that a call holds of the GPU's memory beyond what was there, its results too."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _delay(self, launch: float) -> int:
        """Cycles to spin so that a call that takes the CPU `launch` seconds is queued before the GPU comes to it."""
        return int(self._cycles * min(5e-3, max(0.0, 2 * launch + 30e-6 - self._cool)))

    def take_turns(self, calls: dict[str, Call]) -> dict[str, Times]:
        for call in calls.values():
            call()  # compiles what is compiled late
        launch = {name: self.launch_cost(call) for name, call in calls.items()}
        once = max(self._between(call) for call in calls.values())
        rounds = min(self.MOST, max(self.FEWEST, int(self.SECONDS / once)))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._buffer.sum()
                torch.cuda._sleep(self._delay(launch[name]))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: Times(turns, launch[name]) for name, turns in seconds.items()}

    def limits(self, dtype: torch.dtype) -> dict[str, float]:
        """The highest of copies of 128 MB, 512 MB and 2 GB, read and written; a matmul of 8192^3; medians.

        Large copies count: so the limit is the memory's, and not what a shorter kernel has of it.
        """
        copies = {}
        for megabytes in (128, 512, 2048):
            source = torch.randint(0, 100, (megabytes << 18,), dtype=torch.int32, device=self._buffer.device)
            target = torch.empty_like(source)
            copies[megabytes] = 2 * source.nbytes / self._rate(target, source)
        n = 8192
        a, b = (torch.randn(n, n, device=self._buffer.device, dtype=dtype) for _ in range(2))
        matmul = 2 * n**3 / self.take_turns({"matmul": lambda: torch.mm(a, b)})["matmul"].median
        return {"B": max(copies.values()), "FLOP": matmul} | {f"copy of {m} MB": rate for m, rate in copies.items()}

    def _rate(self, target: torch.Tensor, source: torch.Tensor) -> float:
        return self.take_turns({"copy": lambda: target.copy_(source)})["copy"].median
