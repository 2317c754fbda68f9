"""Texts continued by a model: several at once, to their ends or step by step.

for step in generate(model, [[5, 7], [1]], max_new_tokens=20): print(step.key, step.token)
complete(model, [[5, 7], [1]], max_new_tokens=20)[0].tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megakern.config import GPTConfig
from megakern.model.cache import PAGE_SIZE
from megakern.model.engine import Engine, Request, Step, TokenLogprob
from megakern.model.gpt import GPT
from megakern.model.sampling import Sampling


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop_tokens: Sequence[int] = (),
    logprobs: int | None = None,
) -> Iterator[Step]:
    """Continue every prompt (ids, of any lengths): yields a `Step` for each new token, whose key is the prompt's index.

    A row ends with a stop token (its last), with `max_new_tokens`, or when the model's sequence is full. Dropout is off
    while it runs. Raises ConfigError, before anything runs, for an empty or too long prompt or an option out of range.
    """
    requests = [
        Request(
            prompt=tuple(int(token) for token in prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=tuple(stop_tokens),
            logprobs=logprobs,
        )
        for prompt in prompts
    ]
    engine = Engine(model, **room_for(model.config, requests))
    for request in requests:
        engine.add(request)
    return _steps(engine)


def room_for(config: GPTConfig, requests: Sequence[Request]) -> dict[str, int]:
    """Sizes of an engine that takes all of these at once."""
    longest = config.sequence_length
    pages = sum(-(-min(len(each.prompt) + max(1, each.max_new_tokens), longest) // PAGE_SIZE) for each in requests)
    return {"tokens": max(1, pages) * PAGE_SIZE, "max_batch": max(1, len(requests))}


def _steps(engine: Engine) -> Iterator[Step]:
    while engine.busy:
        yield from engine.step()


@dataclass
class Completion:
    """What one prompt became."""

    tokens: list[int] = field(default_factory=list)
    """The new ones, a stop token at their end included."""
    finish: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


def complete(model: GPT, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
    """`generate` to its end."""
    done = [Completion() for _ in prompts]
    for step in generate(model, prompts, **options):
        each = done[step.key]
        each.tokens.append(step.token)
        each.finish = step.finish or ""
        if step.logprob is not None:
            each.logprobs.append(step.logprob)
    return done
