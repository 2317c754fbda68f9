"""Log-probabilities of given tokens under a model: of texts of any length by a sliding window, and of continuations.

A text of N tokens is read after one token that stands before texts, so that its first token counts too. With sequences
of T and a stride of s, window i predicts the tokens from i s on up to i s + T - 1, and counts those that no window
before it did: each token once, with T - s or more tokens before it where there are so many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megakern.config import require
from megakern.data.loader import IGNORE
from megakern.data.progress import Progress
from megakern.data.tokenizer import Tokenizer
from megakern.inference import Loaded

LOGIT_BYTES = 256 * 2**20
"""fp32 logits that are held at once, or those of one sequence where that has more."""


@dataclass(frozen=True)
class TextScore:
    nats: float
    """- sum of log-probabilities."""
    tokens: int
    bytes: int
    """Of the text in UTF-8."""

    def lines(self) -> list[tuple[str, str]]:
        each = self.nats / self.tokens
        return [
            ("text", f"{self.bytes:,} bytes, {self.tokens:,} tokens"),
            ("perplexity", f"{math.exp(each):,.3f} a token ({each:.4f} nats)"),
            ("bits a byte", f"{self.nats / math.log(2) / self.bytes:.4f}"),
        ]


def score_text(loaded: Loaded, text: str, *, stride: int | None = None) -> TextScore:
    """Of the whole text. stride: tokens from window to window; None: half of the model's sequence.

    Raises ConfigError: no text, a stride that is not from 1 to the sequence length.
    """
    T = loaded.config.model.sequence_length
    stride = max(1, T // 2) if stride is None else stride
    require(1 <= stride <= T, f"--stride must be from 1 to the model's sequence_length of {T}, got {stride}")
    require(bool(text), "there is no text to score: it is empty")
    ids = loaded.tokenizer.encode(text)
    nats = 0.0
    with Progress(len(ids), "scoring", unit=" tokens") as progress:
        for window in token_scores(loaded, [first_token(loaded.tokenizer), *ids], stride):
            nats -= sum(window)
            progress.update(len(window))
    return TextScore(nats, len(ids), len(text.encode()))


def first_token(tokenizer: Tokenizer) -> int:
    """What stands before a text: the one its tokenizer's file puts there, as Llama's <s>, else the end of the last."""
    return (tokenizer.encode_prompt("") or [tokenizer.eod])[0]


def token_scores(loaded: Loaded, ids: Sequence[int], stride: int) -> Iterator[list[float]]:
    """Log-probabilities of ids[1:], in order, those that a window counts at a time."""
    T = loaded.config.model.sequence_length
    windows = []  # (tokens, targets, how many of the last targets count)
    done, start = 0, 0
    while done < len(ids) - 1:
        stop = min(start + T, len(ids) - 1)
        windows.append((ids[start:stop], ids[start + 1 : stop + 1], stop - done))
        done, start = stop, start + stride
    for some in _batches(windows, T * loaded.config.model.padded_vocab_size * 4):
        for (_, targets, count), (scores, _) in zip(
            some, continuation_scores(loaded, [pair[:2] for pair in some]), strict=True
        ):
            yield scores[len(targets) - count :]


def continuation_scores(loaded: Loaded, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list:
    """Of (tokens, targets) of one length each, all in one pass: (log-probabilities, whether each is the likeliest)."""
    longest = max(len(tokens) for tokens, _ in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for row, (before, after) in enumerate(pairs):
        tokens[row, : len(before)] = torch.tensor(before)
        targets[row, : len(after)] = torch.tensor(after)
    with torch.no_grad():
        logits = loaded.model(tokens.to(loaded.device)).float()
    best = logits.argmax(-1).cpu()
    picked = targets.clamp(min=0).to(loaded.device)
    scores = (logits.gather(-1, picked.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).double().cpu()
    found = []
    for row, (_, after) in enumerate(pairs):
        n = len(after)
        found.append((scores[row, :n].tolist(), (best[row, :n] == targets[row, :n]).tolist()))
    return found


def score_continuations(
    loaded: Loaded, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy generation gives it) of each continuation after its context, both of ids.

    A context that is too long loses its beginning; an empty one is `first_token`. Raises ConfigError: a
    continuation longer than the model's sequence.
    """
    T = loaded.config.model.sequence_length
    rows = []
    for context, continuation in pairs:
        require(len(continuation) <= T, f"a continuation has {len(continuation)} tokens, the model's sequence has {T}")
        ids = [*(context or [first_token(loaded.tokenizer)]), *continuation][-(T + 1) :]
        rows.append((ids[:-1], ids[1:], len(continuation)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # rows of like length share a pass
    found: dict[int, tuple[float, bool]] = {}
    for some in _batches(order, T * loaded.config.model.padded_vocab_size * 4):
        for i, (scores, greedy) in zip(some, continuation_scores(loaded, [rows[i][:2] for i in some]), strict=True):
            count = rows[i][2]
            own = slice(len(scores) - count, None)
            found[i] = (sum(scores[own]), all(greedy[own]))
    return [found[i] for i in range(len(rows))]


def _batches(items: Sequence, each: int) -> Iterator[list]:
    """`each`: bytes of logits of one item."""
    size = max(1, LOGIT_BYTES // each)
    for i in range(0, len(items), size):
        yield list(items[i : i + size])
