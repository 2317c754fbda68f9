"""Conversations to text and tokens by a chat template: the Jinja text that Hugging Face models carry, or ours.

A message is {"role": ..., "content": ...}. The template runs in jinja2's immutable sandbox with what such templates
expect (transformers, utils/chat_template_utils.py): trimmed blocks, loop controls, `raise_exception`, `strftime_now`,
`tojson` without HTML escapes, `{% generation %}` around what the model writes, and the special tokens by their names.

A message cannot forge a turn: names of special tokens within it are encoded as the letters they are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megakern.config import ConfigError, require
from megakern.data.files import DataError, write_atomically
from megakern.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_FILE = "special_tokens.json"
"""Special tokens that the template names, as {"bos_token": "<s>"}."""
GENERATION_FILE = "generation.json"
"""{"eos_token_ids": [...]}: tokens that end an answer."""
CHAT_FILES = (TEMPLATE_FILE, SPECIAL_FILE, GENERATION_FILE)

LONGEST = 1 << 20
"""Characters that a template may have."""

DEFAULT = """\
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('a role must be system, user or assistant, got ' ~ message['role']) -}}
    {%- endif -%}
    {%- if loop.first -%}{{- eos_token -}}{%- endif -%}
    {{- message['role'] ~ '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}
"""
"""Turns apart by the end-of-document token, the only one that every tokenizer of ours has: no text spells it."""

# Unicode's noncharacters, which no text may hold: where an answer starts and ends, and a special token's name in a
# message. They are in what the sandbox gives, and never in what leaves this module.
_ANSWER, _ANSWER_END, _NAME, _NAME_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = str.maketrans("", "", _ANSWER + _ANSWER_END + _NAME + _NAME_END)
_ANY_MARK = re.compile(f"[{_ANSWER}{_ANSWER_END}{_NAME}{_NAME_END}]")


class ChatTemplate:
    """A chat template, ready to render. source: its Jinja text. special_tokens: names the template may use, to text."""

    def __init__(self, source: str = DEFAULT, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError: not a valid template, or a special token that is not text."""
        require(len(source) <= LONGEST, f"a chat template may have {LONGEST:,} characters, got {len(source):,}")
        self.source, self.special_tokens = source, dict(special_tokens or {})
        for name, text in self.special_tokens.items():
            require(isinstance(text, str), f"special token {name!r} must be text, got {text!r}")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        self.marks_answers = re.search(r"{%-?\s*generation\b", source) is not None

    @property
    def sha256(self) -> str:
        """Hash of the template and its special tokens."""
        canonical = json.dumps([self.source, self.special_tokens], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ChatTemplate:
        """That of a run folder: its chat_template.jinja, else DEFAULT. `eos_token` is the tokenizer's end of document,
        unless special_tokens.json says otherwise. Raises ConfigError, DataError that name the file."""
        folder = Path(folder)
        special = {"eos_token": Tokenizer.load(folder / "tokenizer.json").eod_token}
        special |= _special_tokens(folder / SPECIAL_FILE)
        path = folder / TEMPLATE_FILE
        if not path.exists():
            return cls(DEFAULT, special)
        try:
            return cls(path.read_text(encoding="utf-8"), special)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike) -> None:
        """Write what `load` reads into a folder that has its tokenizer.json."""
        write_atomically(Path(folder) / TEMPLATE_FILE, self.source.encode())
        text = json.dumps(self.special_tokens, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / SPECIAL_FILE, text.encode())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, equal to `apply_chat_template(..., tokenize=False)`; `add_generation_prompt` ends
        it where the model is to answer. Raises ConfigError: messages of another form, or that the template refuses."""
        return self._run(messages, add_generation_prompt, tools).translate(_MARKS)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of the conversation. Special tokens come from the template alone. Raises like `render`."""
        safe = _quoted((messages, tools), tokenizer.special_tokens)
        return _encoded(self._run(safe[0], add_generation_prompt, safe[1]), tokenizer)[0]

    def answer_mask(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and for each whether the assistant writes it: its turns up to the token that
        ends them.

        A template says it with `{% generation %}`; for another, a turn is what is added to the text before it by
        rendering it too. Raises ConfigError like `render`, or when that text is changed by what comes later.
        """
        messages, tools = _quoted((check_messages(messages), tools), tokenizer.special_tokens)
        text = self._run(messages, False, tools)
        if not self.marks_answers:
            text = self._marked(messages, tools, text, tokenizer.special_tokens)
        return _encoded(text, tokenizer)

    def _marked(self, messages: list[dict[str, Any]], tools, text: str, special: Sequence[str]) -> str:
        """`text`, the rendered conversation, with marks around the turns of the assistant."""
        cuts: list[tuple[int, str]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._run(messages[:index], True, tools) if index else ""
            after = self._run(messages[: index + 1], False, tools)
            require(
                text.startswith(after) and after.startswith(before),
                f"this chat template writes message {index + 1} in another way when more follow, so that its answers "
                f"cannot be found; put {{% generation %}} and {{% endgeneration %}} around them in the template",
            )
            cuts += [(len(before), _ANSWER), (_end_of_turn(after, len(before), special), _ANSWER_END)]
        for place, mark in reversed(cuts):
            text = text[:place] + mark + text[place:]
        return text

    def _run(self, messages, add_generation_prompt: bool, tools) -> str:
        values = {
            **self.special_tokens,
            "messages": check_messages(messages),
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, OverflowError) as error:
            raise ConfigError(f"the chat template cannot render these messages: {error}") from error


def _special_tokens(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise DataError(f'{path}: must hold names and texts, as {{"bos_token": "<s>"}}, got {table!r:.200}')
    return table


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain values, without keys that are None. Raises ConfigError that names the message."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    require(is_list and len(messages) > 0, f"messages must be a list of one message or more, got {messages!r:.100}")
    checked = []
    for number, message in enumerate(messages, 1):
        require(isinstance(message, Mapping), f"message {number} must be an object, got {type(message).__name__}")
        message = {key: value for key, value in _plain(message, f"message {number}").items() if value is not None}
        role, content = message.get("role"), message.get("content")
        require(isinstance(role, str) and role != "", f"message {number}: role must be text, got {role!r:.100}")
        require(
            isinstance(content, str) or (content is None and "tool_calls" in message),
            f"message {number} ({role}): content must be text, got {content!r:.100}",
        )
        checked.append(message)
    return checked


def _plain(value: Any, what: str) -> Any:
    """A copy of JSON values only: nothing else may reach the sandbox."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, what) for item in value]
    raise ConfigError(f"{what} must hold values of JSON only, got {type(value).__name__}")


def _quoted(values: tuple, special: Sequence[str]) -> tuple:
    """Values with marks around the names of special tokens in every text but roles. Raises ConfigError: marks in it."""
    names = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def quote(value: Any) -> Any:
        if isinstance(value, str):
            found = _ANY_MARK.search(value)
            require(
                found is None,
                f"a message holds U+{ord(found[0]) if found else 0:04X}, a noncharacter that no text has; remove it",
            )
            return names.sub(lambda match: _NAME + match[0] + _NAME_END, value)
        if isinstance(value, Mapping):
            return {key: quote(item) for key, item in value.items()}
        return [quote(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tuple(quote(value) for value in values)


def _end_of_turn(text: str, start: int, special: Sequence[str]) -> int:
    """Where the turn text[start:] ends for the one who writes it: after its last special token, which ends it (what
    follows, as a line end, is the template's); without one, where the text does."""
    ends = [match.end() for name in special for match in _of_template(name).finditer(text, start)]
    return max(ends, default=len(text))


@functools.lru_cache(maxsize=4096)
def _of_template(name: str) -> re.Pattern[str]:
    return re.compile(f"(?<!{_NAME}){re.escape(name)}(?!{_NAME_END})")


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of marked text, and for each whether it starts within an answer."""
    parts: list[tuple[str, bool]] = []  # between marks of names: (text, is such a name)
    answers: list[tuple[int, int]] = []  # in characters without any mark
    place, start, depth = 0, 0, 0
    for piece, is_name in _between_names(text):
        bare = ""
        for part in re.split(f"([{_ANSWER}{_ANSWER_END}])", piece):
            if part == _ANSWER:
                start = place if depth == 0 else start
                depth += 1
            elif part == _ANSWER_END:
                depth -= 1
                if depth == 0:
                    answers.append((start, place))
            else:
                bare, place = bare + part, place + len(part)
        parts.append((bare, is_name))
    ids: list[int] = []
    mask: list[bool] = []
    place = 0
    for part, is_name in parts:
        if not part:
            continue
        tokens, starts = tokenizer.encode_with_starts(part, allow_special=not is_name)
        ids += tokens
        mask += [any(low <= place + each < high for low, high in answers) for each in starts]
        place += len(part)
    return ids, mask


def _between_names(text: str) -> Iterator[tuple[str, bool]]:
    """(text without marks of names, whether it is a name in a message), one after the other. A template may have cut
    such a name: what is left of its marks still keeps the text on their two sides apart."""
    is_name = False
    for part in re.split(f"([{_NAME}{_NAME_END}])", text):
        if part in (_NAME, _NAME_END):
            is_name = part == _NAME
        else:
            yield part, is_name


class _Answer(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the model writes, between marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller) -> str:
        return _ANSWER + caller() + _ANSWER_END


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answer, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
