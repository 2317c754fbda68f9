"""The paged cache: logits in pieces, rows of any lengths, forks, and pages that are given once and come back."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.layers.cache import LayerCache
from megakern.model.cache import KVCache, PagePool, Sequence
from tests.test_generate import FAMILIES, make


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_in_pieces_of_rows_of_different_lengths(name):
    """Row b is read in pieces of other sizes than its neighbours, pages are taken in turns."""
    model, tokens = make(name), tokens_of(3, 20)
    whole = model(tokens)
    pool = PagePool(model.config, tokens=100, page_size=4)
    sequences = [Sequence(pool) for _ in range(3)]
    for counts in ([5, 1, 12], [1, 1, 1], [6, 4, 1], [8, 14, 6]):
        starts, T = [each.length for each in sequences], max(counts)
        rows = [tokens[b, starts[b] : starts[b] + count] for b, count in enumerate(counts)]
        padded = torch.stack([torch.nn.functional.pad(row, (T - len(row), 0), value=7) for row in rows])
        logits = model(padded, cache=KVCache(pool, sequences, counts))
        for b, count in enumerate(counts):
            expected = whole[b, starts[b] : starts[b] + count]
            torch.testing.assert_close(logits[b, T - count :], expected, rtol=1e-4, atol=1e-4)
    assert [each.length for each in sequences] == [20] * 3
    for each in sequences:
        each.close()
    assert pool.free == pool.count == 25


@torch.no_grad()
def test_forks_share_full_pages_and_go_their_own_ways():
    model, tokens = make("llama"), tokens_of(1, 6)
    pool = PagePool(model.config, tokens=48, page_size=4)
    first = Sequence(pool)
    model(tokens, cache=KVCache(pool, [first], [6]))
    second = first.fork()
    assert second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1] and pool.free == 9
    endings = torch.tensor([[11, 12, 13], [21, 22, 23]])
    logits = model(endings, cache=KVCache(pool, [first, second], [3, 3]))
    whole = model(torch.cat([tokens.expand(2, 6), endings], dim=1))
    torch.testing.assert_close(logits, whole[:, 6:], rtol=1e-4, atol=1e-4)
    first.close()
    assert pool.free == 9, "the shared page has a user still"
    third = second.fork()
    torch.testing.assert_close(
        model(tokens[:, :1], cache=KVCache(pool, [third], [1]))[0],
        model(torch.cat([tokens, endings[1:], tokens[:, :1]], dim=1))[0, -1:], rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    second.close()
    third.close()
    assert pool.free == pool.count


def test_wrong_use_is_named():
    model = make("gpt2")
    pool = PagePool(model.config, tokens=16, page_size=4)
    first, second = Sequence(pool), Sequence(pool)
    cache = KVCache(pool, [first], [9])
    with pytest.raises(ValueError, match="2 more pages of 4 tokens are needed, 1 of 4 are free; end a sequence"):
        KVCache(pool, [second], [5])
    assert second.length == 0 and pool.free == 1
    with pytest.raises(ValueError, match=r"sequence_length of 64, got \[56\] after \[9\]"):
        KVCache(pool, [first], [56])
    with pytest.raises(ValueError, match=r"must get 1 token or more .* got \[0\]"):
        KVCache(pool, [second], [0])
    with torch.no_grad(), pytest.raises(ValueError, match=r"cache was made for tokens of shape \(1, 9\), got \(1, 8\)"):
        model(tokens_of(1, 8), cache=cache)
    with pytest.raises(ValueError, match="a cache is for generation; call the model under"):
        model(tokens_of(1, 9), cache=cache)
    with pytest.raises(ValueError, match="page_size a power of two, got 8 and 3"):
        PagePool(model.config, tokens=8, page_size=3)


def test_bytes_of_a_token_are_those_that_are_allocated():
    config = FAMILIES["llama"]
    pool = PagePool(config, tokens=96, dtype=torch.bfloat16)
    held = sum(pages.numel() * pages.element_size() for pair in pool.layers for pages in pair)
    assert held == 96 * PagePool.bytes_per_token(config, mk.ParallelContext(), torch.bfloat16)
    assert isinstance(KVCache(pool, [Sequence(pool)], [1]).layers[0], LayerCache)
