"""A trained run as something that writes text: load its newest checkpoint, continue prompts, text as it is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megakern.config import require
from megakern.data.chat import GENERATION_FILE
from megakern.data.files import DataError
from megakern.data.tokenizer import Tokenizer
from megakern.model.beam import Hypothesis, beam_search
from megakern.model.engine import STOP, Engine, Request, Step
from megakern.model.generate import room_for
from megakern.model.gpt import GPT
from megakern.model.sampling import Sampling
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint, machine
from megakern.train.config import RunConfig
from megakern.train.run import open_run
from megakern.train.start import load_model


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, with what it was trained with."""

    model: GPT
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    device: torch.device
    stop_tokens: tuple[int, ...]
    """All that end an answer: those of generation.json, else the end-of-document token alone."""

    def engine(self, **sizes) -> Engine:
        """An engine of the model; `sizes` are those of `Engine`. All text comes from these, and from `beam_search`."""
        return Engine(self.model, **sizes)

    def beam_search(self, prompt: Sequence[int], **options) -> list[Hypothesis]:
        return beam_search(self.model, prompt, **options)


def load_run(run: Path, *, step: int | None = None, parallel: ParallelContext | None = None) -> Loaded:
    """The model of RUN at its newest valid checkpoint, or at `step`, whatever layout it was trained under.

    `parallel`: this process's share of it. Raises ConfigError, DataError or CheckpointError.
    """
    config = open_run(run)
    parallel = parallel or ParallelContext()
    device = torch.device(machine.device_type()) if parallel.mesh is None else parallel.device()
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    stop_tokens = _stop_tokens(run / GENERATION_FILE, tokenizer)
    folder = run / "ckpt"
    path = checkpoint.newest(folder) if step is None else folder / checkpoint.folder_name(step)
    dtype = machine.DTYPES[config.train.precision]
    stored = machine.DTYPES[config.parameter_precision]
    model = GPT(config.model, parallel, device=device, dtype=stored, compute_dtype=dtype)
    state = load_model(model, config, path)
    checkpoint.require_tokenizer(state, tokenizer.sha256, path)
    return Loaded(model.eval(), tokenizer, config, path, device, stop_tokens)


def _stop_tokens(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    if not path.exists():
        return (tokenizer.eod,)
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    ids = table.get("eos_token_ids") if isinstance(table, dict) else None
    V = tokenizer.vocab_size
    if not (isinstance(ids, list) and ids and all(type(each) is int and 0 <= each < V for each in ids)):
        wanted = f'{{"eos_token_ids": [...]}} with ids from 0 to {V - 1}'
        raise DataError(f"{path}: must hold {wanted}, got {table!r:.100}")
    return tuple(ids)


class StopStrings:
    """Passes text on up to the first stop string; what may be the start of one is held back until that is decided."""

    def __init__(self, words: Sequence[str]) -> None:
        require(all(words), "a stop string must not be empty")
        self.words, self.found, self._held = tuple(words), False, ""

    def push(self, piece: str) -> str:
        """The text that is certain now, which may be ""."""
        held = self._held + piece
        cuts = [held.index(word) for word in self.words if word in held]
        if cuts:
            self.found, self._held = True, ""
            return held[: min(cuts)]
        keep = max((_overlap(held, word) for word in self.words), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The rest, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, word: str) -> int:
    """The longest end of `text` that is a beginning of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


class TextOf:
    """The text of one request, step by step. `finish` is None until it ends; then "stop" or "length"."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop_tokens = tokenizer.stream_decoder(), frozenset(stop_tokens)
        self._strings = StopStrings(stop)
        self.finish: str | None = None
        self.tokens = 0

    def push(self, step: Step) -> str:
        """The new text, which may be "". A stop token or string is no part of it."""
        piece = ""
        if step.token is not None:
            self.tokens += 1
            if step.token not in self._stop_tokens:
                piece = self._strings.push(self._decoder.push(step.token))
        self.finish = STOP if self._strings.found else step.finish
        if step.finish is not None and not self._strings.found:
            piece += self._strings.push(self._decoder.finish())
            self.finish = STOP if self._strings.found else step.finish
            piece += self._strings.finish()
        return piece


def prompt_ids(loaded: Loaded, text: str) -> tuple[int, ...]:
    """Raises ConfigError for a prompt that leaves no room."""
    ids = loaded.tokenizer.encode_prompt(text) or [loaded.tokenizer.eod]
    longest = loaded.config.model.sequence_length
    require(
        len(ids) < longest,
        f"the prompt has {len(ids)} tokens; this model reads {longest} in all, so give it fewer than that",
    )
    return tuple(ids)


@dataclass(frozen=True)
class Piece:
    """New text of one of several prompts. finish: None while it goes on; then "stop" or "length"."""

    row: int
    text: str
    finish: str | None


class Writer:
    """Continues prompts all at once; counts what it made. Iterate over it, once.

    A text ends at a stop string, at a stop token, at `max_tokens`, or when the model's sequence is full. Raises
    ConfigError, before anything runs, for a prompt that leaves no room or an option out of range.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 200,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Sequence[str] = (),
    ) -> None:
        require(max_tokens >= 1, f"max_tokens must be 1 or more, got {max_tokens}")
        self.tokens = 0
        how = {"max_new_tokens": max_tokens, "sampling": sampling, "stop_tokens": loaded.stop_tokens}
        ids = [prompt_ids(loaded, each) if isinstance(each, str) else tuple(each) for each in prompts]
        requests = [Request(prompt=each, **how) for each in ids]
        self._engine = loaded.engine(**room_for(loaded.config.model, requests))
        for request in requests:
            self._engine.add(request)
        self._texts = [TextOf(loaded.tokenizer, loaded.stop_tokens, stop) for _ in prompts]

    def __iter__(self) -> Iterator[Piece]:
        while self._engine.busy:
            for step in self._engine.step():
                text = self._texts[step.key]
                piece = text.push(step)
                self.tokens += 1
                if text.finish is not None:
                    self._engine.cancel(step.key)  # the engine knows nothing of stop strings
                if piece or text.finish is not None:
                    yield Piece(step.key, piece, text.finish)


@dataclass(frozen=True)
class BestText:
    text: str
    score: float
    """Sum of log-probabilities / tokens^length_penalty."""
    tokens: int


def best_texts(
    loaded: Loaded,
    prompt: str,
    *,
    beams: int,
    max_tokens: int = 200,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
) -> list[BestText]:
    """The continuations that beam search finds, best first. Raises ConfigError."""
    found = loaded.beam_search(
        prompt_ids(loaded, prompt),
        beams=beams,
        max_new_tokens=max_tokens,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
        stop_tokens=loaded.stop_tokens,
    )
    stops = set(loaded.stop_tokens)

    def text_of(tokens: Sequence[int]) -> str:
        return loaded.tokenizer.decode(token for token in tokens if token not in stops)

    return [BestText(text_of(each.tokens), each.score, len(each.tokens)) for each in found]
