"""Batches of a run's data, text or conversations, and the loss of a model on them."""

from __future__ import annotations

import torch

from megakern.data.loader import IGNORE, Loader, validation_batches
from megakern.data.manifest import PreparedData
from megakern.data.packing import PackedLoader, PackedRows, packed_validation_batches
from megakern.model.gpt import GPT
from megakern.parallel.collectives import all_reduce
from megakern.parallel.context import ParallelContext
from megakern.parallel.data import release


def make_loader(data: PreparedData, sequence_length: int, seed: int, **more) -> Loader | PackedLoader:
    """Batches of text, or of packed conversations."""
    if data.template is None:
        return Loader(data.train, sequence_length, seed, **more)
    return PackedLoader(PackedRows(data.train, data.answers("train"), sequence_length), seed, **more)


def loss_of(model: GPT, batch: tuple[torch.Tensor, ...], device: torch.device, **how) -> torch.Tensor:
    """Of (tokens, targets), or (tokens, targets, cu_seqlens)."""
    tokens, targets, *documents = (tensor.to(device, non_blocking=True) for tensor in batch)
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
    total, count = 0.0, 0
    length = model.config.sequence_length
    how = {"limit": windows, "shard": shard}
    if data.template is None:
        batches = validation_batches(data.validation, length, rows, **how)
    else:
        held_out = PackedRows(data.validation, data.answers("validation"), length)
        batches = packed_validation_batches(held_out, rows, **how)
    for batch in batches:
        total += loss_of(model, batch, device, reduction="sum").item()
        count += int((batch[1] != IGNORE).sum())
    model.train()
    release(model)
    if parallel.group("dp") is not None:
        sums = all_reduce(torch.tensor([total, count], dtype=torch.float64, device=device), parallel.group("dp"))
        total, count = sums.tolist()
    return total / count
