"""Lines of chat or prompt and response to tokens, and for each token whether the assistant wrote it.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "response": "...", "system": "..."}

`tools` and `system` may be left out; other keys are not read. What the loss counts is every turn of the assistant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megakern.config import ConfigError, require
from megakern.data.chat import ChatTemplate, check_messages
from megakern.data.documents import Documents
from megakern.data.files import DataError, flush_to_disk
from megakern.data.indexed import IndexedWriter, dtype_for
from megakern.data.tokenizer import Tokenizer

TOO_LONG = ("refuse", "cut", "skip")


class Conversations(Documents):
    """`Documents` whose texts are conversations in canonical JSON: {"messages": [...], "tools": [...] or null}.

    where: file and line of the one that `read` gave last. Each is rendered once, so that what the template refuses is
    found with its line.
    """

    def __init__(self, inputs, template: ChatTemplate, **options: Any) -> None:
        super().__init__(inputs, **options)
        self.template, self.where = template, ""

    def _whole(self, path, file, on_bytes):
        raise DataError(f"{path}: conversations come a JSON object a line, in .jsonl or .jsonl.gz files")

    def _text_of(self, line: str, where: str) -> str:
        table = self._table_of(line, where)
        try:
            talk = {"messages": check_messages(_messages(table)), "tools": table.get("tools")}
            answered = any(message["role"] == "assistant" for message in talk["messages"])
            require(answered, "there is no message of the role assistant to learn from")
            self.template.render(talk["messages"], tools=talk["tools"])
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from error
        self.where = where
        return json.dumps(talk, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _messages(table: dict[str, Any]) -> Any:
    if "messages" in table:
        return table["messages"]
    if "prompt" not in table or "response" not in table:
        keys = ", ".join(map(repr, list(table)[:10])) or "none"
        raise ConfigError(f"a line must have 'messages', or 'prompt' and 'response'; this one has {keys}")
    turns = (("system", "system"), ("prompt", "user"), ("response", "assistant"))
    return [{"role": role, "content": table[key]} for key, role in turns if table.get(key) is not None]


def text_of(conversation: str) -> str:
    """Its roles and what they say, to learn a vocabulary from."""
    messages = json.loads(conversation)["messages"]
    return "\n".join(f"{message['role']}\n{message.get('content') or ''}" for message in messages)


@dataclass(kw_only=True)
class Written:
    """One split as it was written."""

    bytes: int = 0
    """UTF-8 bytes of the rendered conversations."""
    answers: int = 0
    """Tokens that the assistant wrote."""
    cut: int = 0
    skipped: int = 0
    without_answer: int = 0


class ConversationWriter:
    """PREFIX.bin and .idx as for any text, a conversation a document, and PREFIX.answers: a byte a token, 1 where the
    assistant wrote it."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, template: ChatTemplate, longest: int | None, too_long: str):
        self.tokenizer, self.template, self.longest, self.too_long = tokenizer, template, longest, too_long
        self.done = Written()
        self.ends: set[int] = set()  # last tokens of answers
        self._tokens = IndexedWriter(prefix, dtype_for(tokenizer.vocab_size))
        self._answers = open(prefix.with_name(prefix.name + ".answers"), "wb")  # noqa: SIM115 - closed below

    def add(self, conversation: str, where: str) -> None:
        """Raises DataError that starts with `where`: too long, or the template does not show its answers."""
        talk = json.loads(conversation)
        try:
            ids, mask = self.template.answer_mask(talk["messages"], self.tokenizer, tools=talk["tools"])
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from error
        self.ends |= {token for token, (own, after) in zip(ids, pairwise([*mask, False]), strict=True) if own > after}
        if self.longest is not None and len(ids) > self.longest:
            if self.too_long == "refuse":
                raise DataError(
                    f"{where}: {len(ids):,} tokens, more than --longest {self.longest:,}; shorten it, or cut or skip "
                    f"such conversations with --too-long"
                )
            if self.too_long == "skip":
                self.done.skipped += 1
                return
            self.done.cut += 1
            ids, mask = ids[: self.longest], mask[: self.longest]
        if not any(mask[1:]):
            self.done.without_answer += 1
            return
        self._tokens.add_document(ids)
        self._answers.write(np.array(mask, dtype=np.uint8).tobytes())
        self.done.bytes += len(self.template.render(talk["messages"], tools=talk["tools"]).encode())
        self.done.answers += sum(mask)

    def __enter__(self) -> ConversationWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        with self._answers:
            if kind is None:
                flush_to_disk(self._answers)
        self._tokens.__exit__(kind, value, traceback)


def answer_ends(writers: Iterable[ConversationWriter], tokenizer: Tokenizer) -> list[int]:
    """Special tokens that end an answer: what generation stops at."""
    special = {each for name in tokenizer.special_tokens for each in tokenizer.encode(name, allow_special=True)}
    ends = {token for writer in writers for token in writer.ends}
    return sorted({tokenizer.eod} | (special & ends))
