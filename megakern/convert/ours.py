"""Our side of a conversion: the model's tensors in a checkpoint, read and written in slices of bounded size."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megakern.model.hf.names import Read, Rule
from megakern.parallel.blocks import Block
from megakern.parallel.context import DIMS, ParallelContext
from megakern.train.checkpoint_commit import Staged, commit
from megakern.train.checkpoint_load import PieceReader
from megakern.train.checkpoint_plan import Part
from megakern.train.files import Files
from megakern.train.manifest import CheckpointError, Manifest, piece_key

PART_BYTES = (4 * 2**20, 128 * 2**20)
"""Smallest and largest limit of a shard; in between it is a sixth of the largest tensor. While one is made, the one
before and its bytes are still there, and a piece is copied twice: together that is no more than the tensor."""
CHUNK_BYTES = 16 * 2**20
"""Read at once where nothing else decides."""


def chunks(shape: tuple[int, ...], item: int = 4, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that are at most `limit` bytes, or one row."""
    rows = max(1, limit // (math.prod(shape[1:]) * item))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


class Checkpoint:
    """The model's tensors of one checkpoint: `shapes`, `dtypes` and `read`, under their names in the model."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.state = path, manifest.state
        entries = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
        self._entries = {name.removeprefix("model."): entry for name, entry in entries.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}
        self._stack = ExitStack()
        self._reader = self._stack.enter_context(PieceReader(path))

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        entry = self._entries[name]
        cuts = [rows, *[columns or slice(None)][: len(entry.shape) - 1]]
        ranges = [cut.indices(size)[:2] for cut, size in zip(cuts, entry.shape, strict=True)]
        shape = tuple(max(0, stop - start) for start, stop in ranges)
        into = torch.empty(shape, dtype=getattr(torch, entry.dtype))
        if into.numel():
            block = Block(tuple(start for start, _ in ranges), shape, (0,) * len(shape))
            self._reader.copy(f"model.{name}", entry, block, into)
        return into

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class _Piece:
    rule: Rule
    start: int
    stop: int

    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.rule.shape[1:])

    def offsets(self) -> tuple[int, ...]:
        return (self.start, *[0] * (len(self.rule.shape) - 1))


def write_checkpoint(
    folder: Path, rules: list[Rule], read: Read, *, dtype: str, ranks: int, state: dict[str, Any], files: Files
) -> Path:
    """Step 0 in `folder` from tensors of theirs, each cut along its first dim over `ranks` ranks.

    Any layout loads it. Raises CheckpointError: a failed write, or weights that are not finite, all of them named.
    """
    item = getattr(torch, dtype).itemsize
    low, high = PART_BYTES
    limit = max(low, min(high, max(math.prod(rule.shape) for rule in rules) * item // 6))
    pieces = [list(_pieces_of(rules, rank, ranks, item, limit)) for rank in range(ranks)]
    plan = {f"model.{rule.ours}": (dtype, rule.shape, {}) for rule in rules}
    for rank, own in enumerate(pieces):
        for piece in own:
            plan[f"model.{piece.rule.ours}"][2][piece.offsets(), piece.shape()] = rank
    layout = {dim: ranks if dim == "dp" else 1 for dim in DIMS}
    parts = _parts(pieces, read, getattr(torch, dtype), limit)
    staged = Staged(folder, 0, state, plan, parts, layout, torch.get_num_threads(), keep=sys.maxsize)
    return commit(staged, ParallelContext(), files=files)


def _pieces_of(rules: list[Rule], rank: int, ranks: int, item: int, limit: int) -> Iterator[_Piece]:
    for rule in rules:
        each = -(-rule.shape[0] // ranks)  # as torch.chunk
        first, last = min(rank * each, rule.shape[0]), min((rank + 1) * each, rule.shape[0])
        for start, stop in chunks((last - first, *rule.shape[1:]), item, limit):
            yield _Piece(rule, first + start, first + stop)


def _parts(ranks: list[list[_Piece]], read: Read, dtype: torch.dtype, limit: int) -> Iterator[Part]:
    bad: dict[str, None] = {}
    for rank, pieces in enumerate(ranks):
        for number, group in enumerate(_groups(pieces, dtype.itemsize, limit)):
            tensors, entries = {}, []
            for piece in group:
                name, offsets, shape = f"model.{piece.rule.ours}", piece.offsets(), piece.shape()
                key = piece_key(name, piece.rule.shape, offsets, shape)
                rows = piece.rule.our_rows(read, piece.start, piece.stop).to(dtype)
                tensors[key] = rows.clone(memory_format=torch.contiguous_format)  # no view of a mapped file
                if not torch.isfinite(torch.stack(torch.aminmax(tensors[key]))).all():
                    bad[piece.rule.ours] = None
                entries.append((name, key, offsets, shape))
            yield Part(f"rank-{rank:05d}-part-{number:03d}.safetensors", tensors, entries)
    if bad:
        raise CheckpointError(f"these weights hold NaN or infinity: {', '.join(bad)}; a model like this cannot be used")


def _groups(pieces: Iterable[_Piece], item: int, limit: int) -> Iterator[list[_Piece]]:
    group: list[_Piece] = []
    room = limit
    for piece in pieces:
        size = math.prod(piece.shape()) * item
        if group and size > room:
            yield group
            group, room = [], limit
        group.append(piece)
        room -= size
    if group:
        yield group
