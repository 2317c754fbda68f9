"""Batches of a run's data, text or conversations, and the loss of a model on them."""

from __future__ import annotations

from contextlib import suppress

import torch

from megakern.data.files import DataError
from megakern.data.loader import IGNORE, Loader, validation_batches
from megakern.data.manifest import PreparedData
from megakern.data.packing import PackedLoader, PackedRows, packed_validation_batches
from megakern.data.progress import Progress
from megakern.model.gpt import GPT
from megakern.parallel.collectives import all_reduce
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import release

Batch = tuple[torch.Tensor, ...]
"""(tokens, targets), or of conversations (tokens, targets, cu_seqlens)."""


def make_loader(data: PreparedData, sequence_length: int, seed: int, **more) -> Loader | PackedLoader:
    """Batches of text, or of packed conversations."""
    if data.template is None:
        return Loader(data.train, sequence_length, seed, **more)
    return PackedLoader(PackedRows(data.train, data.answers("train"), sequence_length), seed, **more)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; a GPU copies it from pinned memory, and the CPU does not wait for that."""
    if device.type == "cuda":
        batch = tuple(tensor.pin_memory() for tensor in batch)
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


class Batches:
    """Batches of `loader` on `device`. What was prepared is read and copied while the device still computes."""

    def __init__(self, loader: Loader | PackedLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self._prepared: dict[tuple[int, int], Batch] = {}

    def take(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1, as `Loader.batch` gives them and raises."""
        prepared, self._prepared = self._prepared, {}
        return prepared.get((first, count)) or to_device(self.loader.batch(first, count), self.device)

    def prepare(self, first: int, count: int) -> None:
        """For the next `take`, which raises what is wrong with them: the step before is not theirs."""
        with suppress(DataError):
            self._prepared = {(first, count): to_device(self.loader.batch(first, count), self.device)}


def loss_of(model: GPT, batch: Batch, **how) -> torch.Tensor:
    tokens, targets, *documents = batch
    return model(tokens, targets, cu_seqlens=documents[0] if documents else None, **how)


def evaluate(
    model: GPT,
    data: PreparedData,
    rows: int,
    device: torch.device,
    *,
    windows: int | None = None,
    parallel: ParallelContext | None = None,
) -> float:
    """Mean loss of `model` in nats a token over the first `windows` held-out windows, None: all; the same on all ranks.
    Of conversations a window is a row of them, and their answers count alone.

    Each dp rank of `parallel` reads its part of them, `rows` at a time.
    """
    parallel = parallel or ParallelContext()
    shard = parallel.rank("dp"), parallel.size("dp")
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    length = model.config.sequence_length
    how = {"limit": windows, "shard": shard}
    if data.template is None:
        batches = validation_batches(data.validation, length, rows, **how)
        there = -(-(data.validation.token_count - 1) // length)
    else:
        held_out = PackedRows(data.validation, data.answers("validation"), length)
        batches = packed_validation_batches(held_out, rows, **how)
        there = len(held_out)
    own = -(-(min(windows, there) if windows else there) // shard[1])
    with Progress(own, "evaluating", unit=" windows", shown=parallel.world_rank == 0) as progress:
        for batch in batches:
            count += int((batch[1] != IGNORE).sum())
            total += loss_of(model, to_device(batch, device), reduction="sum")
            progress.update(len(batch[0]))
    model.train()
    release(model)
    sums = torch.stack([total, torch.full_like(total, count)])
    total, count = all_reduce(sums, parallel.group("dp")).tolist()
    return total / count
