"""Answers in the form of OpenAI's API, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from megakern.data.tokenizer import Tokenizer
from megakern.model.engine import TokenLogprob
from megakern.serve.worker import Delta

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    both = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": both}


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """What a token shows, and its bytes where they do not depend on its neighbours."""
    raw = tokenizer.token_bytes(token)
    if raw is None:
        return tokenizer.decode([token]), None
    return raw.decode("utf-8", "replace"), list(raw)


class ChatAnswer:
    """Of POST /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def opening(self, index: int) -> dict[str, Any]:
        """The first event of a choice."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        found, logprobs = [], self._table([] if delta.logprob is None else [delta.logprob])
        if delta.text or logprobs is not None:
            choice = {"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}
            found.append(self._chunk(choice))
        if delta.finish is not None:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": delta.finish}
            found.append(self._chunk(choice))
        return found

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": [choice]}

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": counts}

    def whole(self, choices: Sequence[Sequence[Delta]], counts: dict[str, int]) -> dict[str, Any]:
        made = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
                "logprobs": self._table([delta.logprob for delta in deltas if delta.logprob is not None]),
                "finish_reason": deltas[-1].finish,
            }
            for index, deltas in enumerate(choices)
        ]
        return {**self.head, "object": self.kind, "choices": made, "usage": counts}

    def _table(self, found: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs or not found:
            return None
        return {"content": [{**self._one(each.token, each.logprob), "top_logprobs": self._top(each)} for each in found]}

    def _top(self, each: TokenLogprob) -> list[dict[str, Any]]:
        return [self._one(token, value) for token, value in each.top]

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text, raw = token_text(self._tokenizer, token)
        return {"token": text, "logprob": value, "bytes": raw}


class CompletionAnswer:
    """Of POST /v1/completions. prompts: for each choice the ids and text of its prompt, which `echo` repeats."""

    kind = "text_completion"

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, logprobs: bool, echo: bool, prompts: list[tuple[Sequence[int], str]]
    ) -> None:
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": self.kind, "created": int(time.time())}
        self.head["model"] = model
        self._tokenizer, self._logprobs, self._echo, self._prompts = tokenizer, logprobs, echo, prompts
        self._offsets = [len(text) if echo else 0 for _, text in prompts]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [{**self.head, "choices": [self._choice(index, [delta])]}]

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": counts}

    def whole(self, choices: Sequence[Sequence[Delta]], counts: dict[str, int]) -> dict[str, Any]:
        made = [self._choice(index, deltas) for index, deltas in enumerate(choices)]
        return {**self.head, "choices": made, "usage": counts}

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Of all deltas of a text, or of the next one."""
        ids, prompt = self._prompts[index]
        text = "".join(delta.text for delta in deltas)
        first = deltas[0].tokens <= 1
        if self._echo and first:
            text = prompt + text
        table = None
        if self._logprobs:
            table = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            if self._echo and first:
                self._add(table, ids[0], None, None, 0)
                place = len(table["tokens"][0])
                for each in deltas[0].prompt or ():
                    place = self._add(table, each.token, each.logprob, each.top, place)
            for delta in deltas:
                if delta.logprob is not None:
                    each, place = delta.logprob, self._offsets[index]
                    self._offsets[index] = self._add(table, each.token, each.logprob, each.top, place)
        return {"index": index, "text": text, "logprobs": table, "finish_reason": deltas[-1].finish}

    def _add(self, table: dict[str, list], token: int, value: float | None, top: tuple | None, place: int) -> int:
        text, _ = token_text(self._tokenizer, token)
        table["tokens"].append(text)
        table["token_logprobs"].append(value)
        tops = None if top is None else {token_text(self._tokenizer, each)[0]: found for each, found in top}
        table["top_logprobs"].append(tops)
        table["text_offset"].append(place)
        return place + len(text)
