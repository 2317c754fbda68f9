"""Continuous batching: requests that join and leave at any step are written as if alone, and no page is lost."""

from __future__ import annotations

import random

import pytest
import torch

import megakern as mk
from megakern.config import ConfigError
from megakern.model.engine import Engine, Request
from megakern.model.generate import complete
from megakern.model.sampling import Sampling
from tests.test_generate import FAMILIES, make


def requests(count: int, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            prompt=tuple(draw.randrange(250) for _ in range(draw.randint(1, 45))),
            max_new_tokens=draw.randint(1, 30),
            sampling=Sampling(temperature=draw.choice((0.0, 1.0)), top_k=draw.choice((None, 50)), seed=i),
        )
        for i in range(count)
    ]


def alone(model: mk.GPT, request: Request) -> list[int]:
    how = {"max_new_tokens": request.max_new_tokens, "sampling": request.sampling}
    return complete(model, [request.prompt], **how)[0].tokens


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
@pytest.mark.parametrize("page_size, prefill", [(4, 7), (32, 100)])
def test_requests_join_and_leave_at_any_step(name, page_size, prefill):
    """In a cache for a third of them, with prompts read in pieces of 7 tokens; a fifth is cancelled on the way."""
    model, draw, wanted = make(name), random.Random(1), requests(24)
    engine = Engine(model, tokens=24 * 20, max_batch=6, prefill_tokens=prefill, page_size=page_size)
    made: dict[int, list[int]] = {}
    finished: dict[int, str] = {}
    cancelled: set[int] = set()
    todo, together = list(wanted), 0
    while todo or engine.busy:
        for _ in range(draw.choice((0, 0, 1, 3))):
            if todo:
                made[engine.add(todo.pop(0))] = []
        if draw.random() < 0.05 and engine.running:
            cancelled.add(key := draw.choice(engine.running).key)
            engine.cancel(key)
        for step in engine.step():
            assert step.key not in cancelled and step.key not in finished
            made[step.key].append(step.token)
            if step.finish:
                finished[step.key] = step.finish
        together = max(together, len(engine.running))
        used = {page for row in engine.running for page in row.sequence.pages}
        assert len(used) + engine.pool.free == engine.pool.count, "a page is lost or given twice"
    assert together >= 4 and len(cancelled) >= 2
    assert engine.pool.free == engine.pool.count
    for key, request in enumerate(wanted):
        expected = alone(model, request)
        assert made[key] == (expected[: len(made[key])] if key in cancelled else expected), request


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_of_the_prompt_are_those_of_one_pass(name):
    model, prompt = make(name), tuple(range(3, 203, 4))
    engine = Engine(model, tokens=200, prefill_tokens=16)
    for count in (0, 2):
        engine.add(Request(prompt=prompt, max_new_tokens=count, prompt_logprobs=True, logprobs=2))
    engine.add(Request(prompt=prompt, max_new_tokens=1))
    steps: dict[int, list] = {0: [], 1: [], 2: []}
    while engine.busy:
        for step in engine.step():
            steps[step.key].append(step)
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([prompt]))[0], dim=-1)
    expected = table[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    for key in (0, 1):
        found = steps[key][0].prompt
        assert [each.token for each in found] == list(prompt[1:])
        torch.testing.assert_close(torch.tensor([each.logprob for each in found]), expected, rtol=1e-4, atol=1e-4)
        assert [each.top[0][0] for each in found] == table[:-1].argmax(-1).tolist()
        assert all(step.prompt is None for step in steps[key][1:])
    assert [step.token for step in steps[0]] == [None] and steps[0][0].finish == "length"
    assert steps[1][0].token == steps[2][0].token and steps[2][0].prompt is None


def test_what_can_never_be_served_is_refused_when_it_is_asked_for():
    engine = Engine(make("gpt2"), tokens=20, page_size=4)
    with pytest.raises(ConfigError, match=r"a text of up to 29 tokens needs 8 pages of the cache, which has 5 of 4"):
        engine.add(Request(prompt=(1,) * 20, max_new_tokens=10))
    engine.add(Request(prompt=(1,) * 15, max_new_tokens=6))
    with pytest.raises(ConfigError, match="max_batch must be 1 or more, got 0"):
        Engine(make("gpt2"), tokens=20, max_batch=0)


def test_cancelled_requests_that_wait_never_run():
    engine = Engine(make("gpt2"), tokens=64, max_batch=1)
    first, second = (engine.add(Request(prompt=(1, 2), max_new_tokens=3)) for _ in range(2))
    engine.step()
    engine.cancel(second)
    keys = [step.key for _ in range(3) for step in engine.step()]
    assert keys == [first, first] and not engine.busy
    engine.cancel(first)  # long done


def test_requests_wait_for_pages():
    """In a cache that is full before the batch is: first come, first served, and no text is stopped."""
    model, wanted = make("gpt2"), requests(8)
    engine = Engine(model, tokens=80, max_batch=8, page_size=4)
    keys, together, order = [engine.add(request) for request in wanted], 0, []
    made: dict[int, list[int]] = {key: [] for key in keys}
    while engine.busy:
        for step in engine.step():
            order += [] if made[step.key] else [step.key]
            made[step.key].append(step.token)
        together = max(together, len(engine.running))
    assert together < 8 and order == keys
    assert [made[key] for key in keys] == [alone(model, request) for request in wanted]
    assert engine.pool.free == engine.pool.count
