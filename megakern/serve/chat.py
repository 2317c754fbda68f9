"""`megakern chat`: a conversation in the terminal, or over a pipe: a line is a message.

/reset forgets the conversation, /system TEXT sets what the model is told first, /quit ends. Ctrl-C stops an answer.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence

from megakern.config import ConfigError, require
from megakern.data.chat import ChatTemplate
from megakern.inference import Loaded, Writer
from megakern.model.sampling import Sampling
from megakern.serve.generate import show

HELP = "/reset forgets the conversation, /system TEXT sets what the model is told first, /quit ends"


class Chat:
    """A conversation with a model: its messages, and what it answers.

    When it grows too long for the model, the oldest turns are left out, never the system message; `left_out` counts
    them. max_tokens: of one answer; None: 512, or half of what the model reads where that is less. Raises ConfigError
    for an option out of range.
    """

    def __init__(
        self,
        loaded: Loaded,
        template: ChatTemplate,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Sequence[str] = (),
    ) -> None:
        longest = loaded.config.model.sequence_length
        max_tokens = min(512, longest // 2) if max_tokens is None else max_tokens
        require(1 <= max_tokens < longest, f"max_tokens must be 1 to {longest - 1} with this model, got {max_tokens}")
        self._loaded, self._template = loaded, template
        self._how = {"max_tokens": max_tokens, "sampling": sampling, "stop": tuple(stop)}
        self.system, self.turns, self.left_out = system, [], 0

    def reset(self) -> None:
        self.turns, self.left_out = [], 0

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; what was written of it stays, should the caller end it early.

        Raises ConfigError, and forgets `text`, when it is too long or the template refuses it.
        """
        turns, ids = self._fitting([*self.turns, {"role": "user", "content": text}])
        writer = Writer(self._loaded, [ids], **self._how)
        self.left_out += len(self.turns) + 1 - len(turns)
        self.turns = turns
        written = ""
        try:
            for piece in writer:
                written += piece.text
                yield piece.text
        finally:
            self.turns.append({"role": "assistant", "content": written})

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The last of the turns that leave room for an answer, and the ids of the conversation."""
        room = self._loaded.config.model.sequence_length - self._how["max_tokens"]
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        while True:
            ids = self._template.encode([*first, *turns], self._loaded.tokenizer, add_generation_prompt=True)
            if len(ids) <= room:
                return turns, ids
            require(
                len(turns) > 2,
                f"the message has {len(ids)} tokens with what goes around it, and {room} fit beside the answer: "
                f"shorten it, or lower --max-tokens",
            )
            turns = turns[2:]


def talk(chat: Chat) -> None:
    """Reads messages from the standard input until it ends, or /quit. With a terminal: a prompt, and lines edited."""
    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
        print(f"{HELP}; Ctrl-C stops an answer.", file=sys.stderr)
    with _Interrupts() as interrupts:
        while True:
            try:
                line = interrupts.read("> " if terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not terminal:
                    break
                # Meant for an answer that has just ended, as often as not: the conversation stays.
                print("\nto leave: /quit, or Ctrl-D", file=sys.stderr)
                continue
            if line == "/quit":
                break
            if line == "/reset":
                chat.reset()
            elif line == "/system" or line.startswith("/system "):
                chat.system = line.removeprefix("/system").strip() or None
                chat.reset()
            elif line.startswith("/"):
                print(f"there is no command {line.split()[0]}: {HELP}", file=sys.stderr)
            elif line:
                _say(chat, line, interrupts)


def _say(chat: Chat, text: str, interrupts: _Interrupts) -> None:
    left_out = chat.left_out
    pieces = chat.answer(text)
    try:
        for piece in pieces:
            show(piece)
            if interrupts.noted:
                break
    except ConfigError as error:
        print(f"megakern: {error}", file=sys.stderr)
        return
    pieces.close()
    show("\n")
    if chat.left_out > left_out:
        print(f"[{chat.left_out - left_out} of the oldest turns no longer fit and are left out]", file=sys.stderr)


class _Interrupts:
    """Ctrl-C: a KeyboardInterrupt while a line is read, one though it may come twice, from the terminal and from a
    launcher. Elsewhere it is only noted: it must not end a step of the model, which other ranks may share."""

    def __init__(self) -> None:
        self.noted = self._reading = False

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.noted = True
        if self._reading:
            self._reading = False
            raise KeyboardInterrupt

    def read(self, prompt: str) -> str:
        self._reading = True
        try:
            return input(prompt)
        finally:
            self.noted = self._reading = False


def _edit_lines() -> None:
    """Arrow keys and history, where Python was built with them."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
