"""Entropies and the bigram model against direct counting with dictionaries. No device needed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megakern.config import ConfigError
from megakern.data.ngram import BigramModel, empirical_entropy


def draw(count, vocab_size, seed=0, dtype=np.uint16):
    """Skewed and dependent: half of the tokens repeat a function of the one before."""
    generator = np.random.RandomState(seed)
    tokens = (vocab_size * generator.rand(count) ** 2).astype(np.int64)
    for i in range(1, count):
        if generator.rand() < 0.5:
            tokens[i] = (tokens[i - 1] * 7 + 1) % vocab_size
    return tokens.astype(dtype)


@pytest.fixture(params=[1 << 22, 7], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr("megakern.data.ngram._CHUNK", request.param)


def test_entropies_against_counting(chunk):
    tokens = draw(500, 11).tolist()
    ones, pairs, before = Counter(tokens), Counter(pairwise(tokens)), Counter(tokens[:-1])
    first = -sum(n / 500 * math.log(n / 500) for n in ones.values())
    second = -sum(n / 499 * math.log(n / before[a]) for (a, _), n in pairs.items())
    assert empirical_entropy(np.array(tokens), 1, 11) == pytest.approx(first, rel=1e-12)
    assert empirical_entropy(np.array(tokens, np.uint16), 2, 4096) == pytest.approx(second, rel=1e-12)


def test_entropies_of_known_sources():
    assert empirical_entropy(np.tile(np.arange(8, dtype=np.uint16), 50), 1, 8) == pytest.approx(math.log(8))
    assert empirical_entropy(np.tile(np.arange(8, dtype=np.uint16), 50), 2, 8) == pytest.approx(0, abs=1e-12)
    fair = np.random.RandomState(0).randint(0, 2, 200_000)
    assert empirical_entropy(fair, 2, 2) == pytest.approx(math.log(2), abs=1e-4)


def kneser_ney(train, vocab_size, a, b):
    """P(b | a) by dictionaries, from Chen and Goodman's formula."""
    pairs = Counter(pairwise(train))
    n1, n2 = (sum(1 for n in pairs.values() if n == k) for k in (1, 2))
    D = n1 / (n1 + 2 * n2)
    lower = (sum(1 for _, y in pairs if y == b) + 1) / (len(pairs) + vocab_size)
    total = sum(n for (x, _), n in pairs.items() if x == a)
    if total == 0:
        return lower
    followers = sum(1 for x, _ in pairs if x == a)
    return max(pairs[a, b] - D, 0) / total + D * followers / total * lower


def test_bigram_against_the_formula(chunk):
    train, held_out = draw(300, 13, seed=1), draw(80, 17, seed=2)
    model = BigramModel(train, 17)
    expected = [kneser_ney(train.tolist(), 17, a, b) for a, b in pairwise(held_out.tolist())]
    np.testing.assert_allclose(model.probability(held_out[:-1], held_out[1:]), expected, rtol=1e-12)
    assert model.cross_entropy(held_out) == pytest.approx(-np.mean(np.log(expected)), rel=1e-12)


@pytest.mark.parametrize("tokens", [draw(300, 13), np.array([0, 1]), np.zeros(50, np.int32)])
def test_probabilities_sum_to_one(tokens):
    model = BigramModel(tokens, 17)
    everything = np.arange(17)
    for a in everything:
        row = model.probability(np.full(17, a), everything)
        assert row.min() > 0 and row.sum() == pytest.approx(1, rel=1e-12)


def test_a_bigram_lies_between_the_entropies_on_what_it_was_fitted_on():
    tokens = draw(20_000, 10)
    first, second = (empirical_entropy(tokens, order, 10) for order in (1, 2))
    assert second * (1 - 1e-9) <= BigramModel(tokens, 10).cross_entropy(tokens) < first
    held_out = draw(20_000, 10, seed=9)
    assert BigramModel(tokens, 10).cross_entropy(held_out) == pytest.approx(second, rel=0.01)


@pytest.mark.parametrize(
    "tokens, vocab_size, message",
    [
        (np.array([1, 5]), 5, "token 5 is out of range for vocab_size = 5; use the tokenizer's size"),
        (np.array([1, -1]), 5, "token -1 is out of range"),
        (np.array([1]), 5, "at least 2 tokens are needed, got 1"),
        (np.array([0.5, 1]), 5, "tokens must be a 1-d array of integers, got 1-d float64"),
        (np.array([[1, 2]]), 5, "tokens must be a 1-d array of integers, got 2-d int64"),
        (np.array([1, 2]), 0, "vocab_size must be from 1 to 2.31 - 1, got 0"),
    ],
)
def test_wrong_input_is_named(tokens, vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        BigramModel(tokens, vocab_size)
    with pytest.raises(ConfigError, match=message):
        empirical_entropy(tokens, 2, vocab_size)
    if vocab_size:
        with pytest.raises(ConfigError, match=message):
            BigramModel(np.array([1, 2, 3]), vocab_size).cross_entropy(tokens)


def test_wrong_order_is_named():
    with pytest.raises(ConfigError, match="order must be 1 or 2, got 3"):
        empirical_entropy(np.array([1, 2]), 3, 5)
