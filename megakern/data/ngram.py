"""What counting can do: entropies of one-token and two-token statistics, the bars that a trained model must clear.

`empirical_entropy` is a bound: no model that sees only so many tokens can do better on these very tokens, not even one
fitted on them. `BigramModel` is the fair rival: fitted on the train split, scored on held-out tokens. A short text has
few repeated pairs, so that the bound of order 2 lies far below what any model of pairs can reach on unseen text.
All results are in nats a token, over the N - 1 predictions of a stream of N tokens (order 1 counts all N).
"""

from __future__ import annotations

import numpy as np

from megakern.config import require

_CHUNK = 1 << 22  # tokens counted at once: 64 MB of temporaries


def empirical_entropy(tokens: np.ndarray, order: int, vocab_size: int) -> float:
    """Entropy of the tokens' own statistics, in nats a token.

    tokens (N,) integers below `vocab_size`. order 1: H(token). order 2: H(token | the token before), from pair counts.
    Raises ConfigError for another order, fewer than `order` tokens, or token ids out of range.
    """
    require(order in (1, 2), f"order must be 1 or 2, got {order}")
    _check(tokens, order, vocab_size)
    if order == 1:
        return _entropy(_count_tokens(tokens, vocab_size))
    codes, counts = _count_pairs(tokens, vocab_size)
    first = np.bincount(codes // vocab_size, weights=counts)
    return _entropy(counts) - _entropy(first)


class BigramModel:
    """An interpolated Kneser-Ney bigram model (Chen and Goodman 1998, section 2.7), discount n1 / (n1 + 2 n2).

        P(b | a) = max(c(ab) - D, 0) / c(a.) + D t(a) / c(a.) * P1(b)       t(a): different tokens seen after a
        P1(b)    = (t'(b) + 1) / (pairs + V)                                t'(b): different tokens seen before b

    An unseen `a` falls back to P1. Every probability is above 0, so the cross entropy is finite.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """tokens (N,), integers below `vocab_size`, N >= 2. Raises ConfigError on other input."""
        _check(tokens, 2, vocab_size)
        self.vocab_size = vocab_size
        self._codes, counts = _count_pairs(tokens, vocab_size)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # With no pair seen once (tiny or artificial input) the estimate is 0, and unseen pairs would be impossible.
        self.discount = once / (once + 2 * twice) if once and twice else 0.5
        first, second = np.divmod(self._codes, vocab_size)
        total = np.bincount(first, weights=counts, minlength=vocab_size)
        followers = np.bincount(first, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        self._lower = (predecessors + 1.0) / (len(self._codes) + vocab_size)
        seen = total > 0
        self._backoff = np.where(seen, self.discount * followers / np.where(seen, total, 1), 1.0)
        self._higher = (counts - self.discount) / total[first]

    def probability(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """P(following | previous), elementwise, float64."""
        codes = previous.astype(np.int64) * self.vocab_size + following
        place = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        higher = np.where(self._codes[place] == codes, self._higher[place], 0.0)
        return higher + self._backoff[previous] * self._lower[following]

    def cross_entropy(self, tokens: np.ndarray) -> float:
        """Mean -log P over the N - 1 predictions in tokens (N,), in nats. Raises ConfigError like the constructor."""
        _check(tokens, 2, self.vocab_size)
        total = 0.0
        for start in range(0, len(tokens) - 1, _CHUNK):
            block = np.asarray(tokens[start : start + _CHUNK + 1])
            total -= float(np.log(self.probability(block[:-1], block[1:])).sum())
        return total / (len(tokens) - 1)


def _check(tokens: np.ndarray, least: int, vocab_size: int) -> None:
    require(
        tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer),
        f"tokens must be a 1-d array of integers, got {tokens.ndim}-d {tokens.dtype}",
    )
    require(len(tokens) >= least, f"at least {least} tokens are needed, got {len(tokens)}")
    require(1 <= vocab_size < 1 << 31, f"vocab_size must be from 1 to 2^31 - 1, got {vocab_size}")
    for start in range(0, len(tokens), _CHUNK):
        block = tokens[start : start + _CHUNK]
        low, high = int(block.min()), int(block.max())
        require(
            low >= 0 and high < vocab_size,
            f"token {low if low < 0 else high} is out of range for vocab_size = {vocab_size}; use the tokenizer's size",
        )


def _count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocab_size)
    return counts


def _count_pairs(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted codes a * V + b (int64) of the pairs that occur, and how often. Memory: different pairs, and one chunk."""
    codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, len(tokens) - 1, _CHUNK):
        block = np.asarray(tokens[start : start + _CHUNK + 1]).astype(np.int64)
        new_codes, new_counts = np.unique(block[:-1] * vocab_size + block[1:], return_counts=True)
        merged, where = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        weights = np.concatenate([counts, new_counts])
        codes, counts = merged, np.bincount(where, weights=weights).astype(np.int64)
    return codes, counts


def _entropy(counts: np.ndarray) -> float:
    present = counts[counts > 0].astype(np.float64)
    total = present.sum()
    return float(np.log(total) - (present * np.log(present)).sum() / total)
