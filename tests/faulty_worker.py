"""A run whose workers fail on purpose, as RUN/fault.json says (tests/faults.py)

    {"rank": 1, "step": 3, "kind": "kill", "where": "step" or "save", "times": 1}

kind: kill, stop, raise, oom (what torch raises on a GPU), memory (a real limit on this process's memory), skip (a
collective that the others make), shape (of one of them), garbage (as shape, where gloo does not notice).
"times": how many starts of the process meet the fault.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megakern.parallel import collectives, trace
from megakern.train import agreement, checkpoint_commit, checkpoint_ranks, worker
from megakern.train.trainer import Trainer


def fail(kind: str, moment: Path) -> None:
    """End or stop this process in the way of `kind`; the time of it is left in the file `moment`."""
    moment.write_text(str(time.time()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "raise":
        raise ArithmeticError("a fault of the test")
    elif kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif kind == "memory":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
        torch.zeros(2**32)  # 16 GiB: more than the addresses that malloc's heap may have already
    else:
        raise ValueError(f"no fault {kind!r}")


def _changed(real: Callable, trainer: dict[str, Trainer], fault: dict, chosen: int, copies: int = 1) -> Callable:
    """A collective whose call number `chosen` of the step fails, is skipped, or is made with another shape; `copies` of
    what this rank has given to it stand for what it gives then."""
    calls = []

    def collective(x, group, *rest, **more):
        if "it" not in trainer or trainer["it"].step != fault["step"]:
            return real(x, group, *rest, **more)
        calls.append(1)
        if len(calls) != chosen:
            return real(x, group, *rest, **more)
        if fault["kind"] not in ("skip", "shape", "garbage"):
            fail(fault["kind"], fault["moment"])
        fault["moment"].write_text(str(time.time()))
        instead = torch.cat([x] * copies, dim=-1)
        if fault["kind"] == "skip":
            return instead
        if fault["kind"] == "garbage":  # as many elements in another order: gloo adds them up without a word
            return real(x.flatten(), group, *rest, **more).view_as(x)
        real(x.flatten()[: x.numel() // 2], group, *rest, **more)
        return instead

    return collective


def _fail_in_step(fault: dict) -> None:
    trainer: dict[str, Trainer] = {}
    start = Trainer._gradients

    def gradients(self: Trainer) -> float:
        trainer["it"] = self
        if self.parallel.mesh is None and self.step == fault["step"]:
            fail(fault["kind"], fault["moment"])
        return start(self)

    Trainer._gradients = gradients
    if os.environ["WORLD_SIZE"] != "1":
        if fault["tp"] > 1:
            collectives.all_reduce = _changed(collectives.all_reduce, trainer, fault, chosen=2)
        else:  # the only one of ours in a step is that of the agreement
            agreement.all_gather_last = _changed(agreement.all_gather_last, trainer, fault, chosen=1, copies=2)


def _fail_in_save(fault: dict) -> None:
    real_write, real_gather = checkpoint_commit._write_parts, checkpoint_ranks.gather
    saving = {"now": False}

    def write(temporary, *rest):
        if temporary.name.startswith(f"step-{fault['step']:08d}"):
            saving["now"] = True
            if fault["kind"] not in ("skip", "shape"):
                fail(fault["kind"], fault["moment"])
        return real_write(temporary, *rest)

    def gather(parallel, report, group=None):
        if not saving["now"]:
            return real_gather(parallel, report, group)
        fault["moment"].write_text(str(time.time()))
        if fault["kind"] == "skip":
            return [report] * parallel.world_size
        wide = torch.zeros(8, dtype=torch.int64)
        trace.collective("all_gather", wide, None)
        torch.distributed.all_gather([torch.empty_like(wide) for _ in range(parallel.world_size)], wide)
        return [report] * parallel.world_size

    checkpoint_commit._write_parts = write
    if fault["kind"] in ("skip", "shape"):
        checkpoint_ranks.gather = gather


def work(run: Path) -> int:
    fault = json.loads((run / "fault.json").read_text())
    if int(os.environ["RANK"]) == fault["rank"]:
        met = run / "fault.times"
        times = int(met.read_text()) if met.exists() else 0
        met.write_text(str(times + 1))
        fault["moment"] = run / "fault.moment"
        if times < fault.get("times", 1):
            {"step": _fail_in_step, "save": _fail_in_save}[fault["where"]](fault)
    return worker.work(run)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
