"""A run as a model of the lm-evaluation-harness (EleutherAI), which brings the tasks; `pip install 'megakern[eval]'`.

>>> import lm_eval
>>> from megakern.evaluate_harness import harness_model
>>> lm_eval.simple_evaluate(harness_model("run"), tasks=["lambada_openai"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megakern.config import ConfigError, require
from megakern.data.chat import ChatTemplate
from megakern.inference import Loaded, TextOf, load_run
from megakern.model.engine import Request
from megakern.model.generate import room_for
from megakern.model.sampling import Sampling
from megakern.scoring import first_token, score_continuations, token_scores

NEW_TOKENS = 256
"""Where a task does not say how many."""

TOGETHER = 64
"""Requests that are generated at once."""


class Scores:
    """The three questions that the harness asks, and its chat templates. A request is an object with `args`."""

    def __init__(self, loaded: Loaded, template: ChatTemplate) -> None:
        super().__init__()  # of the harness's own base class, which comes second
        self.loaded, self.template = loaded, template

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """args (context, continuation): log-probability of the continuation, and whether greedy decoding gives it.

        The two are encoded as one text; white space at the end of the context belongs to the continuation.
        """
        return score_continuations(self.loaded, [self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """args (text,): log-probability of the whole text, each token once, in windows that do not overlap."""
        T, first = self.loaded.config.model.sequence_length, first_token(self.loaded.tokenizer)
        encoded = [[first, *self.loaded.tokenizer.encode(request.args[0])] for request in requests]
        return [sum(sum(window) for window in token_scores(self.loaded, ids, T)) for ids in encoded]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """args (context, options): text up to one of options["until"], to a stop token, or to max_gen_toks tokens."""
        found = []
        for i in range(0, len(requests), TOGETHER):
            found += self._generate([request.args for request in requests[i : i + TOGETHER]])
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.template.render(chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """In the names of the harness's caches."""
        return self.loaded.tokenizer.sha256[:16]

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template.source if chat_template else ""

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        encode = self.loaded.tokenizer.encode
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            return [], encode(continuation)
        before, whole = encode(context), encode(context + continuation)
        return before, whole[len(before) :]

    def _generate(self, arguments: list[tuple[str, dict[str, Any]]]) -> list[str]:
        loaded = self.loaded
        tokenizer, T = loaded.tokenizer, loaded.config.model.sequence_length
        requests, writers = [], []
        for text, given in arguments:
            until, tokens, sampling = _options(given)
            require(1 <= tokens < T, f"max_gen_toks must be from 1 to {T - 1}, the sequence less 1, got {tokens}")
            prompt = (tokenizer.encode(text, allow_special=True) or [first_token(tokenizer)])[-(T - tokens) :]
            requests.append(
                Request(
                    prompt=tuple(prompt),
                    max_new_tokens=tokens,
                    sampling=sampling,
                    stop_tokens=tuple(loaded.stop_tokens),
                )
            )
            writers.append(TextOf(tokenizer, loaded.stop_tokens, until))
        texts, engine = [""] * len(requests), loaded.engine(**room_for(loaded.config.model, requests))
        for request in requests:
            engine.add(request)
        while engine.busy:
            for step in engine.step():
                if writers[step.key].finish is None:
                    texts[step.key] += writers[step.key].push(step)
        return texts


def _options(given: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """(until, max_gen_toks, sampling) of a task's options. Raises ConfigError for one that is not known."""
    given = dict(given)
    until = given.pop("until", ())
    tokens = given.pop("max_gen_toks", NEW_TOKENS)
    temperature = float(given.pop("temperature", 0.0))
    if not given.pop("do_sample", temperature > 0):
        temperature = 0.0
    sampling = Sampling(temperature=temperature, top_k=given.pop("top_k", None), top_p=given.pop("top_p", None))
    require(not given, f"generation options of the task that are not known here: {', '.join(sorted(given))}")
    return (until,) if isinstance(until, str) else tuple(until), int(tokens), sampling


def harness_model(run: str | Path):
    """The run as an `lm_eval.api.model.LM`. Raises ConfigError where the harness is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError(
            f"the lm-evaluation-harness cannot be imported ({error}); install it with: pip install 'megakern[eval]'"
        ) from error
    cls = type("MegakernLM", (Scores, LM), {"__doc__": Scores.__doc__})
    return cls(load_run(Path(run)), ChatTemplate.load(run))
