"""Generation: the cache, the filters, stopping, and two gloo ranks against one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import megakern as mk
from megakern.model.cache import KVCache
from megakern.model.generate import generate, sampling_probabilities

GPT2, LLAMA = mk.presets["tiny-gpt2"], mk.presets["tiny-llama"]
CONFIGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "window": dataclasses.replace(LLAMA, window=5),
    "qk_norm": dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, rope_base=100.0),
}


def make(name: str, parallel: mk.ParallelContext | None = None) -> mk.GPT:
    # Larger weights than for training, so that attention matters to the likeliest token.
    return mk.GPT(dataclasses.replace(CONFIGS[name], init_std=0.2), parallel, seed=4)


def prompt_of(B: int = 3, T: int = 7) -> torch.Tensor:
    return torch.randint(0, 250, (B, T), generator=torch.Generator().manual_seed(2))


def collect(steps) -> tuple[torch.Tensor, str]:
    """-> tokens (B, steps), why it ended."""
    tokens = []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as end:
            return torch.stack(tokens, dim=1), end.value


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_generation_is_the_whole_model_run_again(name):
    model, prompt = make(name), prompt_of()
    cached, why = collect(generate(model, prompt, max_new_tokens=20))
    plain, _ = collect(generate(model, prompt, max_new_tokens=20, cache=False))
    assert cached.shape == (3, 20) and cached.dtype == torch.int64 and why == "max_new_tokens"
    assert torch.equal(cached, plain)
    # And by hand: the likeliest token after each prefix, from one run over the whole text.
    whole = torch.cat([prompt, cached], dim=1)
    assert torch.equal(model(whole)[:, 6:-1].argmax(-1), cached)
    assert len(torch.unique(cached)) > 5, "the text must not be one token again and again for this test to see anything"


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_in_pieces(name):
    model, tokens = make(name), prompt_of(2, 12)
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model.config, batch=2, capacity=12)
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 2], dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"2 samples of 12 \+ 1 tokens do not fit"):
        model(tokens[:, :1], cache=cache)


def numpy_filter(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row at a time, in plain loops."""
    rows = []
    for row in logits.astype(np.float64):
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))
        order = order[: top_k or len(row)]
        weights = {token: float(np.exp((row[token] - row.max()) / temperature)) for token in order}
        total, reached, chosen = sum(weights.values()), 0.0, []
        for token in order:
            if top_p is not None and chosen and reached >= top_p:
                break
            chosen.append(token)
            reached += weights[token] / total
        kept = sum(weights[token] for token in chosen)
        rows.append([weights[token] / kept if token in chosen else 0.0 for token in range(len(row))])
    return np.array(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.9, 1.0])
def test_filters_match_numpy(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 10:20] = logits[1, 10]  # equals
    ours = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(ours.numpy(), numpy_filter(logits.numpy(), temperature, top_k, top_p), atol=1e-12)


def test_samples_follow_the_probabilities():
    rows, logits = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    model = mk.GPT(dataclasses.replace(GPT2, vocab_size=5))
    model.forward = lambda tokens, **_: logits.expand(tokens.shape[0], 1, 5)
    first, second = generate(
        model, torch.zeros(rows, 1, dtype=torch.int64), max_new_tokens=2, temperature=1.0, top_k=4, cache=False
    )
    expected = torch.softmax(logits[[0, 1, 2, 4]].double(), dim=0)
    for tokens in (first, second):
        share = torch.bincount(tokens, minlength=5)[[0, 1, 2, 4]] / rows
        assert (tokens != 3).all()
        assert ((share - expected).abs() < 4 * (expected / rows).sqrt()).all(), f"{share} for {expected}"
    agree = (first == second).double().mean().item()
    assert abs(agree - expected.square().sum().item()) < 0.04, "steps must be independent"


def test_sampling_repeats_by_seed_and_row():
    model, prompt = make("gpt2"), prompt_of()
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    first, _ = collect(generate(model, prompt, seed=1, **options))
    again, _ = collect(generate(model, prompt, seed=1, **options))
    other, _ = collect(generate(model, prompt, seed=2, **options))
    fewer, _ = collect(generate(model, prompt[:2], seed=1, **options))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(fewer, first[:2])
    same, _ = collect(generate(model, prompt[:1].expand(3, 7), seed=1, **options))
    assert not torch.equal(same[0], same[1]), "rows draw their own numbers"


def test_rows_stop_on_their_own():
    model, prompt = make("gpt2"), prompt_of()
    free, _ = collect(generate(model, prompt, max_new_tokens=20))
    stops = [int(free[0, 3]), int(free[1, 8]), int(free[2, 5])]
    tokens, why = collect(generate(model, prompt, max_new_tokens=20, stop_tokens=stops))
    ends = [next(i for i in range(20) if int(free[row, i]) in stops) for row in range(3)]
    assert why == "stopped" and tokens.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(tokens[row, : end + 1], free[row, : end + 1])
        assert (tokens[row, end:] == free[row, end]).all()


@pytest.mark.parametrize("cache", [True, False])
def test_the_models_length_ends_generation(cache):
    model = make("llama")
    tokens, why = collect(generate(model, prompt_of(1, 60), max_new_tokens=50, cache=cache))
    assert tokens.shape[1] == 4 and why == "sequence_length"
    tokens, why = collect(generate(model, prompt_of(1, 60), max_new_tokens=4, cache=cache))
    assert tokens.shape[1] == 4 and why == "max_new_tokens"


def test_training_mode_is_kept_and_dropout_is_off():
    model = mk.GPT(dataclasses.replace(GPT2, dropout=0.5), seed=4)
    steps = generate(model, prompt_of(), max_new_tokens=5)
    next(steps)
    assert model.training and model.blocks[0].training
    model.eval()
    next(steps)
    assert not model.training


def run_on_ranks(name: str, temperature: float) -> torch.Tensor:
    model = make(name, mk.ParallelContext.create(tp=2))
    return collect(generate(model, prompt_of(), max_new_tokens=15, temperature=temperature))[0]


@pytest.mark.parametrize("name, temperature", [("gpt2", 0.0), ("qk_norm", 1.0)])
def test_two_ranks_choose_what_one_chooses(ranks, name, temperature):
    alone, _ = collect(generate(make(name), prompt_of(), max_new_tokens=15, temperature=temperature))
    first, second = ranks.run(run_on_ranks, 2, name, temperature)
    assert torch.equal(first, second) and torch.equal(first, alone)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"prompt": torch.zeros(1, 64, dtype=torch.int64)},
            "64 tokens leaves no room in the model's sequence_length of 64",
        ),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"prompt must be \(B, T\) int64, not empty, got \(1, 0\)"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"prompt must be \(B, T\) int64, not empty, got \(3,\)"),
        ({"prompt": torch.zeros(1, 3)}, "prompt must be .* got .* torch.float32"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(change, message):
    arguments = {"prompt": prompt_of(), "max_new_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(mk.GPT(GPT2, device="meta"), arguments.pop("prompt"), **arguments)
