"""The keys and values of past tokens of all sequences, in pages (arXiv 2309.06180) that are allocated once.

A sequence holds whole pages and nothing else, so what one gives back any other can take, and forks share what they have
in common. On CPUs pages are taken in rising order: a sequence whose pages follow one another is read as one view.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Several

import torch

from megakern.config import GPTConfig
from megakern.layers.cache import LayerCache, Places
from megakern.parallel.context import ParallelContext

PAGE_SIZE = 32  # tokens


class PagePool:
    """Per layer keys and values (pages, page_size, G/R, D): 2 L pages page_size (G/R) D elements in all.

    Holds `tokens` tokens, rounded up to whole pages. Raises ValueError for a page size that is no power of two.
    """

    def __init__(
        self,
        config: GPTConfig,
        parallel: ParallelContext | None = None,
        *,
        tokens: int,
        page_size: int = PAGE_SIZE,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if tokens < 1 or page_size < 1 or page_size & (page_size - 1):
            raise ValueError(
                f"cache: tokens must be 1 or more and page_size a power of two, got {tokens} and {page_size}"
            )
        self.page_size, self.count = page_size, -(-tokens // page_size)
        self.sequence_length = config.sequence_length
        self.device = torch.device("cpu" if device is None else device)
        kv_heads = (parallel or ParallelContext()).shard(config.key_value_heads, "kv_heads")
        shape = (self.count, page_size, kv_heads, config.size_of_head)
        self.layers = [
            tuple(torch.empty(shape, device=self.device, dtype=dtype) for _ in range(2)) for _ in range(config.layers)
        ]
        self.kept: list[dict] = [{} for _ in self.layers]
        """Of each layer, what kernels keep from one batch to the next."""
        self._free = list(range(self.count))
        self._users = [0] * self.count

    @staticmethod
    def bytes_per_token(config: GPTConfig, parallel: ParallelContext, dtype: torch.dtype) -> int:
        kv_heads = parallel.shard(config.key_value_heads, "kv_heads")
        return 2 * config.layers * kv_heads * config.size_of_head * dtype.itemsize

    @property
    def free(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Raises ValueError when fewer are free."""
        if count > self.free:
            raise ValueError(self.lacking(count))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def lacking(self, count: int) -> str:
        return (
            f"cache: {count} more pages of {self.page_size} tokens are needed, {self.free} of {self.count} are free; "
            f"end a sequence first, or make the pool larger"
        )

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] += 1

    def drop(self, pages: list[int]) -> None:
        """A page that nobody has any more is free again."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                heapq.heappush(self._free, page)

    def copy(self, source: int, target: int) -> None:
        for pair in self.layers:
            for pages in pair:
                pages[target] = pages[source]


class Sequence:
    """The pages of one sequence, `length` tokens in use."""

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.pages, self.length = pool, [], 0

    def reserve(self, tokens: int) -> None:
        """Room for this many tokens in all. Raises ValueError when the pool has too few pages, and takes none then."""
        self.pages += self.pool.take(max(0, self.pool.pages_for(tokens) - len(self.pages)))

    def fork(self) -> Sequence:
        """Another sequence that starts with the same tokens: full pages are shared, the last one is copied."""
        other = Sequence(self.pool)
        full = self.length // self.pool.page_size
        if self.length % self.pool.page_size:
            other.pages = self.pool.take(1)
            self.pool.copy(self.pages[full], other.pages[0])
        self.pool.share(self.pages[:full])
        other.pages = self.pages[:full] + other.pages
        other.length = self.length
        return other

    def close(self) -> None:
        """Give all pages back."""
        self.pool.drop(self.pages)
        self.pages, self.length = [], 0


class KVCache:
    """Room for `counts[b]` new tokens of each sequence b, made for one call of `GPT.forward` under `torch.no_grad()`.

    The tokens (B, T) of that call, T the largest count, have those of sequence b last in their row; the logits of what
    stands before them mean nothing. Takes pages as they are needed. Raises ValueError for a sequence that becomes
    longer than the model's, or when pages are lacking.
    """

    def __init__(self, pool: PagePool, sequences: Several[Sequence], counts: Several[int]) -> None:
        self.shape = len(sequences), max(counts)
        past = [sequence.length for sequence in sequences]
        ends = [old + count for old, count in zip(past, counts, strict=True)]
        if min(counts) < 1 or max(ends) > pool.sequence_length:
            raise ValueError(
                f"cache: each sequence must get 1 token or more and stay within the model's sequence_length of "
                f"{pool.sequence_length}, got {list(counts)} after {past}"
            )
        needed = [max(0, pool.pages_for(end) - len(each.pages)) for each, end in zip(sequences, ends, strict=True)]
        if sum(needed) > pool.free:
            raise ValueError(pool.lacking(sum(needed)))
        for sequence, end in zip(sequences, ends, strict=True):
            sequence.reserve(end)
            sequence.length = end
        T, size = self.shape[1], pool.page_size
        rows = [sequence.pages[: pool.pages_for(end)] for sequence, end in zip(sequences, ends, strict=True)]
        most = max(map(len, rows))
        slots = [
            row[at // size] * size + at % size
            for row, old, end in zip(rows, past, ends, strict=True)
            for at in range(old, end)
        ]
        kept = None
        if min(counts) < T:
            kept = [T * (b + 1) - count + i for b, count in enumerate(counts) for i in range(count)]

        def there(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(pool.device, non_blocking=True)

        self.positions = there([[max(0, at) for at in range(end - T, end)] for end in ends])
        """(B, T) int64: of each new token in its sequence."""
        places = Places(
            there([row + [0] * (most - len(row)) for row in rows], torch.int32),
            there(ends, torch.int32),
            there(slots),
            None if kept is None else there(kept),
            self.positions,
            whole=kept is None and max(past) == 0,
        )
        self.layers = [LayerCache(*pair, places, kept) for pair, kept in zip(pool.layers, pool.kept, strict=True)]
