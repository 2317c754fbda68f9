"""What ranks must tell each other to save or load together: a report of each, and who failed."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.context import ParallelContext
from megakern.train.manifest import CheckpointError


def gather(parallel: ParallelContext, report: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The JSON-able `report` of each rank, on every rank. No pickle: JSON text as bytes in a tensor.

    group: all ranks over the CPU, apart from the default group; None: the default group, on its device.
    """
    if parallel.world_size == 1:
        return [report]
    device = parallel.device() if group is None else torch.device("cpu")
    data = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(parallel.world_size)]
    _record(sizes[0], group)
    dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64, device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    _record(padded, group)
    dist.all_gather(parts, padded, group=group)
    return [json.loads(bytes(part[: int(size)].cpu().numpy())) for part, size in zip(parts, sizes, strict=True)]


def _record(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Not what a thread beside the training one does: when that comes between two collectives is chance."""
    if group is None:
        trace.collective("all_gather", tensor, None)


class Phase:
    """`with Phase(parallel, "saving step 3") as phase:` all ranks do a part of the work, then know how it went.

    Each may set `phase.value` (JSON-able); after the block `phase.values` has that of every rank. When the block raised
    on any rank, every rank raises the same `error`, which names the ranks and their reasons, so that nobody waits for a
    rank that failed. group: as for `gather`.
    """

    def __init__(
        self,
        parallel: ParallelContext,
        doing: str,
        group: dist.ProcessGroup | None = None,
        error: type[CheckpointError] = CheckpointError,
    ) -> None:
        self.parallel, self.doing, self.group, self.error = parallel, doing, group, error
        self.value: Any = None
        self.values: list[Any] = []

    def __enter__(self) -> Phase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reports = gather(
            self.parallel, [None if error is None else _reason(error), None if error else self.value], self.group
        )
        self.values = [value for _, value in reports]
        reasons: dict[str, list[int]] = {}
        for rank, (reason, _) in enumerate(reports):
            if reason is not None:
                reasons.setdefault(reason, []).append(rank)
        if not reasons or (error is not None and not isinstance(error, Exception)):
            return  # all well, or this rank was interrupted: its own exception goes on
        lines = [f"{_ranks(ranks, self.parallel.world_size)}{reason}" for reason, ranks in reasons.items()]
        raise self.error(f"{self.doing} failed: " + "; ".join(lines)) from error


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, (CheckpointError, ValueError)) else f"{type(error).__name__}: {error}"


def _ranks(ranks: list[int], world: int) -> str:
    if world == 1:
        return ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: "
