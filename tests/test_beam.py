"""Beam search against every text that there is, and against transformers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import megakern as mk
from megakern.config import ConfigError
from megakern.model.beam import beam_search
from tests.test_hf_parity import gpt2_pair, llama_pair, mistral_pair

SMALL = dataclasses.replace(mk.presets["tiny-llama"], vocab_size=5, vocab_multiple=8, init_std=0.3)


@torch.no_grad()
def every_text(model: mk.GPT, prompt: list[int], steps: int, stop: int, length_penalty: float) -> list[tuple]:
    """(score, tokens) of all texts, best first."""
    found = []
    for length in range(1, steps + 1):
        for text in itertools.product(range(model.config.vocab_size), repeat=length):
            if stop in text[:-1] or (length < steps and text[-1] != stop):
                continue
            table = torch.log_softmax(model(torch.tensor([[*prompt, *text]]))[0].double(), dim=-1)
            value = sum(table[len(prompt) - 1 + i, token].item() for i, token in enumerate(text))
            found.append((value / length**length_penalty, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_enough_for_all_find_the_best_of_all(length_penalty):
    model, prompt = mk.GPT(SMALL, seed=3), [1, 4, 2]
    expected = every_text(model, prompt, 4, stop=0, length_penalty=length_penalty)
    # 4^3 texts can be unfinished before the last step.
    found = beam_search(model, prompt, beams=64, max_new_tokens=4, length_penalty=length_penalty, stop_tokens=[0])
    best = [each.tokens for each in found[:8]]
    assert best == [text for _, text in expected[:8]]
    assert [each.score for each in found[:8]] == pytest.approx([score for score, _ in expected[:8]], abs=1e-5)
    assert {each.finish for each in found[:8]} == {"stop", "length"}


@pytest.mark.parametrize("pair", [gpt2_pair, llama_pair, mistral_pair])
@pytest.mark.parametrize("options", [{}, {"length_penalty": 2.0, "repetition_penalty": 1.3}, {"length_penalty": -0.5}])
def test_the_same_texts_as_transformers(pair, options):
    theirs, ours = pair()
    prompt = torch.randint(0, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    ends = [5, 50]
    expected = theirs.eval().generate(
        prompt, num_beams=4, num_return_sequences=4, max_new_tokens=12, do_sample=False, eos_token_id=ends,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    found = beam_search(ours, prompt[0].tolist(), beams=4, max_new_tokens=12, stop_tokens=ends, **options)
    assert len(found) == 4
    for row, score, each in zip(expected.sequences, expected.sequences_scores, found, strict=True):
        assert tuple(row[9 : 9 + len(each.tokens)].tolist()) == each.tokens
        assert each.score == pytest.approx(score.item(), abs=1e-4)


def test_one_beam_is_greedy_and_pages_suffice_for_long_texts():
    model = mk.GPT(dataclasses.replace(SMALL, vocab_size=40, sequence_length=200), seed=3)
    prompt = list(range(30))
    (only,) = beam_search(model, prompt, beams=1, max_new_tokens=60)
    text = torch.tensor([prompt + list(only.tokens)])
    with torch.no_grad():
        assert model(text)[0, 29:-1].argmax(-1).tolist() == list(only.tokens)
    found = beam_search(model, prompt, beams=7, max_new_tokens=170)
    assert len(found) == 7 and len(found[0].tokens) == 170 and found[0].logprob >= found[6].logprob


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"prompt": [0] * 64}, "the prompt must have 1 to 63 tokens, got 64"),
        ({"repetition_penalty": -1}, "repetition_penalty must be above 0"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        beam_search(mk.GPT(SMALL), **{"prompt": [1], "beams": 2, "max_new_tokens": 3, **change})
