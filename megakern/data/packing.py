"""Conversations packed into rows, each attended to alone; the order is a function of (seed, global row index) alone.

A conversation of n tokens takes n - 1 places of a row of T: token i is in, token i + 1 is its target, where the
assistant wrote it. Rows are filled once for all epochs, longest conversation first, each into the row with the least
room that takes it (best fit decreasing); an epoch is all rows in an order of its own. What is left of a row is one
document of padding. So the state of the loader is the index of the next row, as with plain text.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import torch

from megakern.config import require
from megakern.data.files import DataError
from megakern.data.indexed import IndexedDataset
from megakern.data.loader import IGNORE, _refuse_tokens, epoch_seed

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""tokens (b, T), targets (b, T) int64, cu_seqlens (n b + 1,) int32: see `GPT.forward`."""


class PackedRows:
    """The rows of a split. `documents` a row at most: its conversations, and the padding."""

    def __init__(self, dataset: IndexedDataset, answers: np.ndarray, sequence_length: int) -> None:
        """answers (token_count,) uint8: 1 where the assistant wrote the token. Raises DataError: a conversation longer
        than a row, or without an answer."""
        require(sequence_length >= 1, f"sequence_length must be 1 or more, got {sequence_length}")
        self.dataset, self.answers, self.sequence_length = dataset, answers, sequence_length
        lengths = dataset.lengths.astype(np.int64)
        longest = int(lengths.max())
        if longest > sequence_length + 1:
            raise DataError(
                f"{dataset.bin_path}: a conversation has {longest:,} tokens, and sequence_length = {sequence_length:,} "
                f"takes {sequence_length + 1:,}; lengthen the sequence, or prepare the data with --longest"
            )
        starts = np.cumsum(lengths) - lengths
        counts = np.add.reduceat(answers, starts, dtype=np.int64) - answers[starts]  # nothing predicts a first token
        if len(counts) and counts.min() < 1:
            raise DataError(f"{dataset.bin_path}: conversation {int(counts.argmin())} has no answer to learn from")
        self.rows = best_fit(lengths - 1, sequence_length)
        self.counts = np.array([counts[row].sum() for row in self.rows])
        self.documents = 1 + max(len(row) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: list[int]) -> Packed:
        """Rows by their number; -1 is one of padding alone."""
        T = self.sequence_length
        tokens = np.zeros((len(rows), T), dtype=np.int64)
        targets = np.full((len(rows), T), IGNORE, dtype=np.int64)
        offsets = np.empty((len(rows), self.documents), dtype=np.int32)
        for b, row in enumerate(rows):
            used, ends = 0, []
            for document in self.rows[row] if row >= 0 else ():
                start = int(self.dataset.pointers[document]) // self.dataset.dtype.itemsize
                stop = start + int(self.dataset.lengths[document])
                ids, counts = self.dataset.tokens[start:stop].astype(np.int64), self.answers[start + 1 : stop]
                place = slice(used, used + len(ids) - 1)
                tokens[b, place], targets[b, place] = ids[:-1], np.where(counts, ids[1:], IGNORE)
                used = place.stop
                ends.append(used)
            offsets[b] = b * T + np.array(ends + [T] * (self.documents - len(ends)))
        cu_seqlens = torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int32), offsets.reshape(-1)]))
        return torch.from_numpy(tokens), torch.from_numpy(targets), cu_seqlens


class PackedLoader:
    """Training batches of conversations. `batch(first, count)` depends on nothing but its arguments."""

    def __init__(self, rows: PackedRows, seed: int, *, vocab_size: int | None = None) -> None:
        """vocab_size: no batch may have a token at or above it. Raises ConfigError: a seed out of range."""
        require(0 <= seed < 1 << 32, f"the data seed must be from 0 to 2^32 - 1, got {seed}")
        self.rows, self.seed, self.vocab_size = rows, seed, vocab_size
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, first: int, count: int) -> Packed:
        """Rows first .. first + count - 1. Raises ConfigError: a negative index, a count below 1. DataError: a token
        outside the vocabulary."""
        batch = self.rows.batch(self._numbers(first, count))
        if self.vocab_size is not None:
            _refuse_tokens(batch[0].numpy(), self.vocab_size, f"{self.rows.dataset.bin_path}: rows from {first:,}")
        return batch

    def answers(self, first: int, count: int) -> int:
        """Targets that count in these rows; their tokens are not read."""
        return int(self.rows.counts[self._numbers(first, count)].sum())

    def _numbers(self, first: int, count: int) -> list[int]:
        require(first >= 0, f"a sample index must be 0 or more, got {first}")
        require(count >= 1, f"a batch must have 1 sample or more, got {count}")
        return [self._number(index) for index in range(first, first + count)]

    def _number(self, index: int) -> int:
        epoch, i = divmod(index, len(self.rows))
        if epoch not in self._epochs:
            order = np.arange(len(self.rows))
            np.random.RandomState(epoch_seed(self.seed, epoch)).shuffle(order)
            while len(self._epochs) > 1:  # a batch can lie across two epochs
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order
        return int(self._epochs[epoch][i])


def packed_validation_batches(
    rows: PackedRows, batch: int, *, limit: int | None = None, shard: tuple[int, int] = (0, 1)
) -> Iterator[Packed]:
    """The first `limit` rows, each once, shuffled by seed 0 so that a few are like all; `shard` (rank, ranks) as in
    `validation_batches`: as many batches of the same shapes on every rank."""
    rank, ranks = shard
    order = np.arange(len(rows))
    np.random.RandomState(0).shuffle(order)
    numbers = order[:limit].tolist()
    each = -(-len(numbers) // ranks)
    own = numbers[rank::ranks]
    own += [-1] * (each - len(own))
    for i in range(0, each, batch):
        yield rows.batch(own[i : i + batch])


def best_fit(sizes: np.ndarray, room: int) -> list[np.ndarray]:
    """Which items share a row of `room`: each item, largest first, into the row with the least room left that takes it.

    Equal items keep their order, so that the result is a function of `sizes`.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows
    left: list[int] = []  # the keys of with_room, sorted
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect_left(left, size)
        if place == len(left):
            row, before = len(rows), room
            rows.append([])
        else:
            before = left[place]
            row = with_room[before].pop()
            if not with_room[before]:
                del with_room[before], left[place]
        rows[row].append(item)
        after = before - size
        if after not in with_room:
            with_room[after] = []
            insort(left, after)
        with_room[after].append(row)
    return [np.array(row) for row in rows]
