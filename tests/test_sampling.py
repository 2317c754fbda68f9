"""The choice of a token: filters against plain loops, penalties against transformers, draws against their odds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megakern.config import ConfigError
from megakern.model.sampling import Sampling, choose, penalise, probabilities


def numpy_filter(row: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row in plain loops."""
    row = row.astype(np.float64)
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[: top_k or len(row)]
    weights = {token: float(np.exp((row[token] - row.max()) / temperature)) for token in order}
    total, reached, chosen = sum(weights.values()), 0.0, []
    for token in order:
        if top_p is not None and chosen and reached >= top_p:
            break
        chosen.append(token)
        reached += weights[token] / total
    kept = sum(weights[token] for token in chosen)
    return np.array([weights[token] / kept if token in chosen else 0.0 for token in range(len(row))])


def test_filters_match_numpy_each_row_with_its_own():
    options = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (1.0, 0.3, 5.0)
        for top_k in (None, 1, 3, 40, 1000)
        for top_p in (None, 1e-9, 0.5, 0.9, 1.0)
    ]
    logits = 2 * torch.randn(len(options), 50, generator=torch.Generator().manual_seed(0))
    logits[:, 10:20] = logits[:, 10:11]  # equals
    for row, each, found in zip(logits, options, probabilities(logits, options), strict=True):
        expected = numpy_filter(row.numpy(), each.temperature, each.top_k, each.top_p)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12, err_msg=str(each))


def test_draws_follow_the_probabilities():
    draws, logits = 8000, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    seeds = [Sampling(temperature=1.0, top_k=4, seed=seed) for seed in range(draws)]
    first, second = (np.array(choose(logits.expand(draws, 5), seeds, [place] * draws)) for place in (3, 4))
    places = np.array(choose(logits.expand(draws, 5), [seeds[0]] * draws, range(draws)))
    expected = torch.softmax(logits[[0, 1, 2, 4]].double(), dim=0).numpy()
    for tokens in (first, second, places):
        share = np.bincount(tokens, minlength=5)[[0, 1, 2, 4]] / draws
        assert (tokens != 3).all()
        assert (np.abs(share - expected) < 4 * np.sqrt(expected / draws)).all(), f"{share} for {expected}"
    for other in (second, places):
        assert abs((first == other).mean() - (expected**2).sum()) < 0.03, "draws must be independent"


def test_greedy_and_drawn_rows_in_one_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    drawn = Sampling(temperature=1.0, seed=1)
    mixed = choose(logits, [Sampling(), drawn, Sampling(), drawn], [5, 6, 7, 8])
    assert mixed[::2] == logits.argmax(-1)[::2].tolist()
    assert mixed[1::2] == [choose(logits[i : i + 1], [drawn], [i + 5])[0] for i in (1, 3)]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty=penalty)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    prompt, made = [3, 5, 5, 9], [3, 11, 39]
    expected = processor(torch.tensor([prompt + made]), logits[None].clone())[0]
    found = penalise(logits, Sampling(repetition_penalty=penalty), prompt, made)
    assert torch.equal(found, expected) and not torch.equal(found, logits)


def test_presence_and_frequency_penalties_count_what_was_made():
    logits = torch.zeros(6)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalise(logits, sampling, [1, 2], [2, 4, 4, 4]).tolist() == [0, 0, -0.75, 0, -1.25, 0]
    assert penalise(logits, sampling, [1, 2], []).tolist() == [0] * 6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more, got -0.1"),
        ({"temperature": float("nan")}, r"temperature must be 0 \(greedy\) or more, got nan"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0 \(1: none\), got 0.0"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": -3.0}, r"frequency_penalty must be in \[-2, 2\], got -3.0"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**change)
