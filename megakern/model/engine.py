"""Many texts continued at once by one model: requests join and leave between steps (continuous batching).

A step runs the model at most twice: over a piece of the prompts not read yet, `prefill_tokens` in all, and over
the last token of every text that is being written. So a long prompt delays the others by one piece at a time. A request
is taken up, first come first served, when the pages for all it may become are free: once it runs, nothing stops it.

What a step does follows from the calls of `add` and `cancel` before it alone, and all tp ranks have the same logits:
ranks that make the same calls choose the same tokens without talking.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from megakern.config import require
from megakern.model.cache import PAGE_SIZE, KVCache, PagePool, Sequence
from megakern.model.gpt import GPT
from megakern.model.sampling import Sampling, choose, penalise

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    """0 is allowed with `prompt_logprobs`: then nothing is written."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    """A token of these is the last one."""
    logprobs: int | None = None
    """Log-probabilities with each new token: its own, and those of this many likeliest. None: none."""
    prompt_logprobs: bool = False
    """The same for the tokens of the prompt, but the first, in the first step."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the model's probability of a token, before penalties, temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the likeliest, best first."""


@dataclass(frozen=True)
class Step:
    """What a request gets from one step."""

    key: int
    token: int | None
    """None where max_new_tokens = 0."""
    finish: str | None
    """None: goes on. "stop": the token is a stop token. "length": max_new_tokens, or the model's sequence is full."""
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] | None = None


@dataclass(eq=False)
class _Row:
    key: int
    request: Request
    sequence: Sequence
    limit: int
    made: list[int] = field(default_factory=list)
    prompt: list[TokenLogprob] = field(default_factory=list)

    @property
    def unread(self) -> int:
        return max(0, len(self.request.prompt) - self.sequence.length)

    @property
    def text_length(self) -> int:
        return len(self.request.prompt) + len(self.made)


class Engine:
    """`add` requests, then `step` until not `busy`.

    tokens           room of the cache, in tokens
    max_batch        texts written at once; others wait
    prefill_tokens   tokens of prompts in one step, what fills up shorter rows included

    Raises ConfigError for a size below 1. Not thread-safe.
    """

    def __init__(
        self, model: GPT, *, tokens: int, max_batch: int = 64, prefill_tokens: int = 512, page_size: int = PAGE_SIZE
    ) -> None:
        for name, value in (("tokens", tokens), ("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            require(value >= 1, f"{name} must be 1 or more, got {value}")
        self.model, self.max_batch, self.prefill_tokens = model, max_batch, prefill_tokens
        device = next(model.parameters()).device
        how = {"page_size": page_size, "device": device, "dtype": model.compute_dtype}
        self.pool = PagePool(model.config, model.parallel, tokens=tokens, **how)
        self.waiting: deque[_Row] = deque()
        self.running: list[_Row] = []
        self._keys = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raises ConfigError for a request that can never be served."""
        longest, vocabulary, T = self.model.config.sequence_length, self.model.config.vocab_size, len(request.prompt)
        require(T >= 1, "the prompt is empty: give it one token or more, the end-of-document token for none in mind")
        require(
            request.max_new_tokens >= (0 if request.prompt_logprobs else 1),
            f"max_new_tokens must be 1 or more, got {request.max_new_tokens}",
        )
        room = longest if request.max_new_tokens == 0 else longest - 1
        require(
            room >= T,
            f"a prompt of {T} tokens leaves no room in the model's sequence_length of {longest}; give {room} or less",
        )
        wrong = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
        require(wrong is None, f"the prompt has the token {wrong}, the model's vocabulary is 0 to {vocabulary - 1}")
        require(
            request.logprobs is None or 0 <= request.logprobs <= vocabulary,
            f"logprobs must be between 0 and the vocabulary's size, got {request.logprobs}",
        )
        pages = self.pool.pages_for(self._room(request))
        require(
            pages <= self.pool.count,
            f"a text of up to {self._room(request)} tokens needs {pages} pages of the cache, which has "
            f"{self.pool.count} of {self.pool.page_size} tokens; ask for fewer tokens, or make the cache larger",
        )

    def _limit(self, request: Request) -> int:
        """New tokens at most."""
        return min(request.max_new_tokens, self.model.config.sequence_length - len(request.prompt))

    def _room(self, request: Request) -> int:
        """Tokens in the cache at most: the last new one is never read."""
        return len(request.prompt) + max(0, self._limit(request) - 1)

    def add(self, request: Request) -> int:
        """-> the key by which its steps are known. Raises ConfigError for a request that can never be served."""
        self.check(request)
        self._keys += 1
        self.waiting.append(_Row(self._keys - 1, request, Sequence(self.pool), self._limit(request)))
        return self._keys - 1

    def cancel(self, key: int) -> None:
        """Gives the pages back at once. Nothing happens for a request that is done."""
        self.waiting = deque(row for row in self.waiting if row.key != key)
        for row in [row for row in self.running if row.key == key]:
            self._end(row)

    def _end(self, row: _Row) -> None:
        row.sequence.close()
        self.running.remove(row)

    def close(self) -> None:
        """Ends all requests."""
        self.waiting.clear()
        for row in list(self.running):
            self._end(row)

    def step(self) -> list[Step]:
        """One step for all: a new token for each text that is being written, and for each whose prompt ends now."""
        while self.waiting and len(self.running) < self.max_batch:
            room = self._room(self.waiting[0].request)
            if self.pool.pages_for(room) > self.pool.free:
                break
            row = self.waiting.popleft()
            row.sequence.reserve(room)
            self.running.append(row)
        writing = [row for row in self.running if not row.unread]
        unread = [row for row in self.running if row.unread]
        parts = []
        if unread:
            parts.append(self._read(unread))
        if writing:
            tokens = [[row.made[-1]] for row in writing]
            parts.append((writing, self._run(tokens, writing)[:, -1].float()))
        rows = [row for part, _ in parts for row in part]
        if not rows:
            return []
        logits = [each for _, each in parts]
        return self._write(rows, logits[0] if len(logits) == 1 else torch.cat(logits))

    def _read(self, unread: list[_Row]) -> tuple[list[_Row], torch.Tensor]:
        """The next piece of the first prompts -> the rows whose prompt ends with it, logits of their last token."""
        if unread[0].request.prompt_logprobs:
            rows = unread[:1]
        else:
            rows, longest = [], 0
            for row in unread:
                longest = max(longest, min(row.unread, self.prefill_tokens))
                if row.request.prompt_logprobs or (rows and longest * (len(rows) + 1) > self.prefill_tokens):
                    break
                rows.append(row)
        counts = [min(row.unread, self.prefill_tokens) for row in rows]
        starts = [row.sequence.length for row in rows]
        pieces = [
            list(row.request.prompt[start : start + count])
            for row, start, count in zip(rows, starts, counts, strict=True)
        ]
        if rows[0].request.prompt_logprobs:
            logits = self._run(pieces, rows, last_only=False)[0].float()
            row, end = rows[0], starts[0] + counts[0]
            targets = row.request.prompt[starts[0] + 1 : end + 1]
            row.prompt += logprobs_of(logits[: len(targets)], targets, row.request.logprobs or 0)
            last = logits[None, -1]
        else:
            last = self._run(pieces, rows)[:, -1].float()
        done = [i for i, row in enumerate(rows) if not row.unread]
        return [rows[i] for i in done], last[done]

    @torch.no_grad()
    def _run(self, tokens: list[list[int]], rows: list[_Row], *, last_only: bool = True) -> torch.Tensor:
        """New tokens of each row -> logits (B, T, V), of the last only (B, 1, V). The model's mode stays what it is."""
        counts = [len(each) for each in tokens]
        T, device = max(counts), self.pool.device
        inputs = torch.tensor([[0] * (T - len(each)) + each for each in tokens], dtype=torch.int64).to(device)
        cache = KVCache(self.pool, [row.sequence for row in rows], counts)
        if not self.model.training:  # changing the mode of every module takes a sixth of a tiny model's step
            return self.model(inputs, cache=cache, last_only=last_only)
        self.model.eval()
        try:
            return self.model(inputs, cache=cache, last_only=last_only)
        finally:
            self.model.train()

    def _write(self, rows: list[_Row], logits: torch.Tensor) -> list[Step]:
        """logits (B, V) -> the next token of each row; rows that are done leave."""
        scores = logits
        if any(row.request.sampling.penalises for row in rows):
            scores = logits.clone()
            for i, row in enumerate(rows):
                if row.request.sampling.penalises:
                    scores[i] = penalise(scores[i], row.request.sampling, row.request.prompt, row.made)
        chosen = choose(scores, [row.request.sampling for row in rows], [row.text_length for row in rows])
        steps = []
        for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            prompt = tuple(row.prompt) if row.request.prompt_logprobs and not row.made else None
            if row.limit == 0:
                steps.append(Step(row.key, None, LENGTH, None, prompt))
                self._end(row)
                continue
            row.made.append(token)
            finish = STOP if token in row.request.stop_tokens else LENGTH if len(row.made) >= row.limit else None
            asked = row.request.logprobs
            logprob = None if asked is None else logprobs_of(logits[i : i + 1], (token,), asked)[0]
            steps.append(Step(row.key, token, finish, logprob, prompt))
            if finish is not None:
                self._end(row)
        return steps


def logprobs_of(logits: torch.Tensor, targets: tuple[int, ...], top: int) -> list[TokenLogprob]:
    """logits (N, V) of one text, the N tokens that came next -> their log-probabilities, and the `top` likeliest."""
    if not targets:
        return []
    table = torch.log_softmax(logits.float(), dim=-1)
    own = table.gather(-1, torch.tensor(targets, device=table.device)[:, None]).squeeze(-1).tolist()
    values, tokens = table.topk(top, dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*each) for each in zip(targets, own, tops, strict=True)]
