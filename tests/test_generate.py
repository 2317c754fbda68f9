"""Generation: with the paged cache as without one, rows of a batch as alone, stopping, two gloo ranks against one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import megakern as mk
from megakern.config import ConfigError
from megakern.layers.parameter import local
from megakern.model.generate import complete, generate
from megakern.model.sampling import Sampling
from megakern.parallel.random import fill_normal
from tests.closeness import assert_close_to_ref

GPT2, LLAMA = mk.presets["tiny-gpt2"], mk.presets["tiny-llama"]
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, rope_base=100.0),
    "mistral": dataclasses.replace(LLAMA, window=5),
}
# Shorter than a page of 32 tokens, one token short of it, and more than one page at the end of 20 new ones.
PROMPTS = [
    torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 31, 1, 40, 16, 16)
]
DRAWN = Sampling(temperature=1.0, top_p=0.95, top_k=100, repetition_penalty=1.1, seed=5)


def make(name: str, parallel: mk.ParallelContext | None = None) -> mk.GPT:
    # Larger weights than for training, so that attention matters to the likeliest token.
    model = mk.GPT(dataclasses.replace(FAMILIES[name], init_std=0.2), parallel, seed=4)
    for key, parameter in model.named_parameters():
        if key.endswith("qkv.bias"):  # zero at the start, which would show nothing
            fill_normal(local(parameter).data, 1, 0.5, full_shape=parameter.shape, offsets=first_rows(parameter, model))
    return model


def first_rows(parameter: torch.Tensor, model: mk.GPT) -> tuple[int]:
    return (model.parallel.tp_rank * len(local(parameter)),)


@torch.no_grad()
def without_cache(model: mk.GPT, prompt: list[int], count: int) -> list[int]:
    """The likeliest token after the whole text, again and again."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_with_the_cache_is_each_text_without_one(name):
    model = make(name)
    found = complete(model, PROMPTS, max_new_tokens=20)
    assert [each.tokens for each in found] == [without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert {each.finish for each in found} == {"length"}
    for each in found:
        assert len(set(each.tokens)) > 3, "a text of one token again and again shows nothing"


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_a_drawn_text_does_not_depend_on_the_batch_around_it(name):
    model = make(name)
    together = [each.tokens for each in complete(model, PROMPTS, max_new_tokens=12, sampling=DRAWN)]
    alone = [complete(model, [prompt], max_new_tokens=12, sampling=DRAWN)[0].tokens for prompt in PROMPTS]
    assert together == alone
    other = complete(model, PROMPTS, max_new_tokens=12, sampling=dataclasses.replace(DRAWN, seed=6))
    assert [each.tokens for each in other] != together
    assert complete(model, PROMPTS, max_new_tokens=12)[0].tokens != together[0]


def test_a_draw_depends_on_its_place_in_the_text_alone():
    """Continuing after the first tokens of a draw gives the rest of it."""
    model = make("llama")
    whole = complete(model, PROMPTS[:1], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=3))[0].tokens
    rest = complete(
        model, [PROMPTS[0] + whole[:5]], max_new_tokens=7, sampling=Sampling(temperature=1.0, seed=3)
    )[0].tokens  # fmt: skip
    assert rest == whole[5:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_as_near_as_the_model_without_a_cache(dtype):
    """Log-probabilities of one text, by steps over a cache of this dtype and in one pass, against float64."""
    config = dataclasses.replace(FAMILIES["qwen3"], init_std=0.1)
    model = mk.GPT(config, seed=4, dtype=torch.float32, compute_dtype=dtype)
    wide = mk.GPT(config, seed=4, dtype=torch.float64)
    (found,) = complete(model, PROMPTS[:1], max_new_tokens=30, logprobs=0)
    text = torch.tensor([PROMPTS[0] + found.tokens])
    own = torch.tensor(found.tokens)[:, None]
    with torch.no_grad():
        truth, same = (
            torch.log_softmax(each(text)[0].double(), -1)[6:-1].gather(-1, own)[:, 0] for each in (wide, model)
        )
    assert_close_to_ref(torch.tensor([each.logprob for each in found.logprobs]).to(dtype), truth, same.to(dtype))


def test_rows_stop_on_their_own():
    model = make("gpt2")
    free = [each.tokens for each in complete(model, PROMPTS, max_new_tokens=20)]
    stops = {free[0][3], free[1][8], free[2][5]}
    found = complete(model, PROMPTS, max_new_tokens=20, stop_tokens=list(stops))
    assert "stop" in {each.finish for each in found}
    for row, each in zip(free, found, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), 20)
        assert each.tokens == row[:end] and each.finish == ("stop" if row[end - 1] in stops else "length")


def test_the_models_length_ends_generation():
    model = make("llama")
    long = (PROMPTS[3] * 2)[:60]
    first, second = complete(model, [long, PROMPTS[0]], max_new_tokens=50)
    assert first.tokens == without_cache(model, long, 4) and first.finish == "length"
    assert len(second.tokens) == 50
    (only,) = complete(model, [[*long, 1, 2, 3]], max_new_tokens=50)
    assert len(only.tokens) == 1


def test_logprobs_are_those_of_the_whole_text():
    model = make("qwen3")
    for prompt, each in zip(
        PROMPTS, complete(model, PROMPTS, max_new_tokens=6, logprobs=3, sampling=DRAWN), strict=True
    ):
        text = torch.tensor([prompt + each.tokens])
        with torch.no_grad():
            table = torch.log_softmax(model(text)[0].double(), dim=-1)[len(prompt) - 1 : -1]
        for row, token, found in zip(table, each.tokens, each.logprobs, strict=True):
            assert found.token == token and found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(3)
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_training_mode_is_kept_and_dropout_is_off():
    model = mk.GPT(dataclasses.replace(GPT2, dropout=0.5), seed=4)
    steps = generate(model, PROMPTS[:1], max_new_tokens=5)
    next(steps)
    assert model.training and model.blocks[0].training
    model.eval()
    next(steps)
    assert not model.training


def write_all(parallel: mk.ParallelContext | None = None) -> list:
    parallel, found = parallel or mk.ParallelContext.create(tp=2), []
    for name in FAMILIES:
        model = make(name, parallel)
        for sampling in (Sampling(), DRAWN):
            found += [each.tokens for each in complete(model, PROMPTS, max_new_tokens=10, sampling=sampling)]
    return found


def test_two_ranks_write_what_one_writes(ranks):
    alone = write_all(mk.ParallelContext())
    for found in ranks.run(write_all, 2):
        assert found == alone


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], [0] * 64]}, "64 tokens leaves no room in the model's sequence_length of 64; give 63"),
        ({"prompts": [[]]}, "the prompt is empty"),
        ({"prompts": [[3, 250]]}, "the prompt has the token 250, the model's vocabulary is 0 to 249"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"logprobs": 251}, "logprobs must be between 0 and the vocabulary's size, got 251"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_before_anything_runs(change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 3, **change}
    with pytest.raises(ConfigError, match=message):
        generate(mk.GPT(GPT2), arguments.pop("prompts"), **arguments)
