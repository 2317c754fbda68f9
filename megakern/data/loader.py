"""Batches of tokens in an order that is a function of (seed, global sample index) alone.

An epoch is Megatron-LM's one-epoch order (megatron/core/datasets/gpt_dataset.py, helpers.cpp). With N tokens and
sequences of T: RandomState(seed) shuffles the documents, then n = (N - 1) // T samples; sample j is the T + 1 tokens
from place j T of the shuffled documents, so that neighbours share one token. What is left at the end of an epoch is
dropped. Epoch e > 0 has its own seed, made of `seed` and e; so the order does not depend on the length of the run (as
Megatron's does), and for one epoch the two are the same. The state of a loader is the index of the next sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from megakern.config import require
from megakern.data.files import DataError
from megakern.data.indexed import IndexedDataset

IGNORE = -100  # the ignore_index of the cross entropy
_CHUNK = 1 << 22


class SampleOrder:
    """The samples of a dataset, numbered without end. Memory: 20 bytes a document and 4 a sample, for two epochs."""

    def __init__(self, dataset: IndexedDataset, sequence_length: int, seed: int) -> None:
        """Raises ConfigError: sequence_length below 1, seed not in [0, 2^32). DataError: less than one sample."""
        require(sequence_length >= 1, f"sequence_length must be 1 or more, got {sequence_length}")
        require(0 <= seed < 1 << 32, f"the data seed must be from 0 to 2^32 - 1, got {seed}")
        self.dataset, self.sequence_length, self.seed = dataset, sequence_length, seed
        self.samples_per_epoch = (dataset.token_count - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{dataset.bin_path}: one sample of sequence_length = {sequence_length} needs {sequence_length + 1:,} "
                f"tokens, there are {dataset.token_count:,}; shorten the sequence or add text"
            )
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def tokens(self, index: int) -> np.ndarray:
        """Sample `index`: (T + 1,) int64. Raises ConfigError for a negative index."""
        require(index >= 0, f"a sample index must be 0 or more, got {index}")
        epoch, i = divmod(index, self.samples_per_epoch)
        documents, starts, shuffle = self._epoch(epoch)
        place = int(shuffle[i]) * self.sequence_length
        row = np.empty(self.sequence_length + 1, dtype=np.int64)
        # The last document that starts at or before the place; empty documents start there too, and come before it.
        k = int(np.searchsorted(starts, place, side="right")) - 1
        filled, offset = 0, place - int(starts[k])
        while filled < len(row):
            piece = self.dataset[int(documents[k])][offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            k, offset = k + 1, 0
        return row

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shuffled documents, the place in the epoch where each starts, and shuffled samples."""
        if epoch not in self._epochs:
            generator = np.random.RandomState(epoch_seed(self.seed, epoch))
            documents = np.arange(len(self.dataset), dtype=np.int32)
            generator.shuffle(documents)
            lengths = self.dataset.lengths[documents].astype(np.int64)
            shuffle = np.arange(
                self.samples_per_epoch, dtype=np.uint32 if self.samples_per_epoch < 2**32 - 2 else np.int64
            )
            generator.shuffle(shuffle)
            while len(self._epochs) > 1:  # a batch can lie across two epochs
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = documents, np.cumsum(lengths) - lengths, shuffle
        return self._epochs[epoch]


def epoch_seed(seed: int, epoch: int) -> int:
    """The first epoch has the seed itself, each later one its own."""
    if epoch == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} epoch {epoch}".encode()).digest()[:4], "little")


class Loader:
    """Training batches. `batch(first, count)` depends on nothing but its arguments: there is no state to save."""

    def __init__(
        self, dataset: IndexedDataset, sequence_length: int, seed: int, *, vocab_size: int | None = None
    ) -> None:
        """vocab_size: no batch may have a token at or above it. Raises like SampleOrder."""
        self.order, self.vocab_size = SampleOrder(dataset, sequence_length, seed), vocab_size

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets) of samples first .. first + count - 1, each (count, T) int64; targets are one token ahead.

        Raises ConfigError: a negative index, a count below 1. DataError: a token outside the vocabulary.
        """
        require(count >= 1, f"a batch must have 1 sample or more, got {count}")
        rows = torch.from_numpy(np.stack([self.order.tokens(index) for index in range(first, first + count)]))
        if self.vocab_size is not None:
            _refuse_tokens(rows.numpy(), self.vocab_size, f"{self.order.dataset.bin_path}: samples from {first:,}")
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_batches(
    dataset: IndexedDataset,
    sequence_length: int,
    batch: int,
    *,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) of the dataset in file order, in windows of T that do not overlap; the first `limit` of them.

    Each is (b, T) int64, b = `batch` but for the last. Every token is predicted once, except the first of all; the last
    window is filled up with token 0 and target IGNORE. shard: (rank, ranks) gives every ranks-th window from rank on,
    and as many batches of the same shapes on every rank: a window too few is one of IGNORE.
    Raises ConfigError: sequence_length, batch, limit or shard out of range. DataError: fewer than two tokens.
    """
    rank, ranks = shard
    require(sequence_length >= 1, f"sequence_length must be 1 or more, got {sequence_length}")
    require(batch >= 1, f"a batch must have 1 window or more, got {batch}")
    require(limit is None or limit >= 1, f"limit must be 1 window or more, got {limit}")
    require(0 <= rank < ranks, f"shard must be (rank, ranks) with 0 <= rank < ranks, got {shard}")
    if dataset.token_count < 2:
        raise DataError(f"{dataset.bin_path}: validation needs 2 tokens or more, there are {dataset.token_count}")
    return _windows(dataset.tokens, sequence_length, batch, limit, rank, ranks)


def _windows(stream, sequence_length, batch, limit, rank, ranks):
    starts = range(0, len(stream) - 1, sequence_length)[:limit]
    each = -(-len(starts) // ranks)
    starts = starts[rank::ranks]
    for i in range(0, each, batch):
        some = starts[i : i + batch]
        tokens = torch.zeros(min(batch, each - i), sequence_length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE)
        for row, start in enumerate(some):
            window = torch.from_numpy(stream[start : start + sequence_length + 1].astype(np.int64))
            tokens[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield tokens, targets


def check_vocabulary(dataset: IndexedDataset, vocab_size: int, limit: int | None = None) -> None:
    """Read the first `limit` tokens; None: all. Raises DataError when one is negative or not below `vocab_size`."""
    stop = dataset.token_count if limit is None else min(limit, dataset.token_count)
    for start in range(0, stop, _CHUNK):
        _refuse_tokens(dataset.tokens[start : min(stop, start + _CHUNK)], vocab_size, str(dataset.bin_path), start)


def _refuse_tokens(block: np.ndarray, vocab_size: int, where: str, start: int = 0) -> None:
    wrong = np.flatnonzero((block < 0) | (block >= vocab_size))
    if len(wrong):
        raise DataError(
            f"{where}: token {start + int(wrong[0]):,} is {block.flat[wrong[0]]}, and the model has a vocabulary of "
            f"{vocab_size:,}; use the tokenizer of this data, or prepare the data with the model's"
        )
