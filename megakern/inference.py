"""A trained run as something that writes text: load its newest checkpoint, stream a continuation of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megakern.config import ConfigError, require
from megakern.data.tokenizer import Tokenizer
from megakern.model.generate import generate
from megakern.model.gpt import GPT
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint, machine
from megakern.train.config import RunConfig
from megakern.train.run import open_run


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, with what it was trained with."""

    model: GPT
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path
    device: torch.device


def load_run(run: Path, *, step: int | None = None) -> Loaded:
    """The model of RUN at its newest valid checkpoint, or at `step`, whatever layout it was trained under.

    Raises ConfigError or CheckpointError.
    """
    config = open_run(run)
    device = torch.device(machine.device_type())
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    folder = run / "ckpt"
    path = checkpoint.newest(folder) if step is None else folder / checkpoint.folder_name(step)
    dtype = machine.DTYPES[config.train.precision]
    stored = machine.DTYPES[config.parameter_precision]
    model = GPT(config.model, device=device, dtype=stored, compute_dtype=dtype)
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    state = checkpoint.load(path, tensors, ParallelContext(), only="model.")
    checkpoint.require_tokenizer(state, tokenizer.sha256, path)
    return Loaded(model.eval(), tokenizer, config, path, device)


def write_text(
    loaded: Loaded,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of `prompt`, piece by piece as it is made; never includes a stop string.

    Ends at a stop string, at the end-of-document token, at `max_tokens`, or when the model's sequence is full.
    Raises ConfigError for a prompt that leaves no room.
    """
    ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eod]
    longest = loaded.config.model.sequence_length
    require(
        len(ids) < longest,
        f"the prompt has {len(ids)} tokens; this model reads {longest} in all, so give it fewer than that",
    )
    require(all(stop), "a stop string must not be empty")
    steps = generate(
        loaded.model,
        torch.tensor([ids], device=loaded.device),
        max_new_tokens=min(max_tokens, longest - len(ids)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=(loaded.tokenizer.eod,),
        seed=seed,
    )
    decoder = loaded.tokenizer.stream_decoder()
    pieces = (decoder.push(int(token)) for token in steps if int(token) != loaded.tokenizer.eod)
    yield from until_stop(_then(pieces, decoder.finish), stop)


def _then(pieces: Iterator[str], last) -> Iterator[str]:
    yield from pieces
    yield last()


def until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Pass text on up to the first stop string; text that may be the start of one is held back until it is decided."""
    held = ""
    for piece in pieces:
        held += piece
        cuts = [held.index(word) for word in stop if word in held]
        if cuts:
            if held[: min(cuts)]:
                yield held[: min(cuts)]
            return
        keep = max((_overlap(held, word) for word in stop), default=0)
        ready = held[: len(held) - keep]
        if ready:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, word: str) -> int:
    """The longest end of `text` that is a beginning of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, max_tokens: int) -> None:
    """Raises ConfigError for sampling options that make no sense."""
    if temperature < 0:
        raise ConfigError(f"--temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"--top-k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be in (0, 1], got {top_p}")
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens must be 1 or more, got {max_tokens}")
