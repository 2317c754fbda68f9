"""Beam search: the likeliest continuations of one prompt, as far as a bounded search finds them.

Each step keeps the `beams` likeliest unfinished texts and extends each by every token. A text that ends with a stop
token is finished, with score = sum of log-probabilities / (new tokens)^length_penalty; the best `beams` of these stay.
The search ends when no unfinished text could score better at its present length, as in transformers' default
(early_stopping=False). Beams share the pages of what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megakern.config import require
from megakern.model import cache
from megakern.model.engine import LENGTH, STOP
from megakern.model.gpt import GPT
from megakern.model.sampling import Sampling, penalise


@dataclass(frozen=True)
class Hypothesis:
    tokens: tuple[int, ...]
    """New tokens, a stop token at their end included."""
    logprob: float
    """Sum over the new tokens."""
    score: float
    finish: str


@torch.no_grad()
def beam_search(
    model: GPT,
    prompt: Sequence[int],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> list[Hypothesis]:
    """The `beams` best continuations of `prompt` that the search finds, best first; fewer where there are no more.

    length_penalty: above 1 favours long texts, 0 compares sums. repetition_penalty changes the log-probabilities as
    transformers' processor does. Raises ConfigError for an option out of range or a prompt that leaves no room.
    """
    longest, T = model.config.sequence_length, len(prompt)
    require(beams >= 1, f"beams must be 1 or more, got {beams}")
    require(max_new_tokens >= 1, f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    require(1 <= T < longest, f"beam search: the prompt must have 1 to {longest - 1} tokens, got {T}")
    penalty = Sampling(repetition_penalty=repetition_penalty)
    steps = min(max_new_tokens, longest - T)
    stops = frozenset(stop_tokens)
    device = next(model.parameters()).device
    # For each beam all it may become, and what its fork holds beside it for a moment.
    pages = 2 * beams * (-(-(T + steps) // cache.PAGE_SIZE) + 1)
    how = {"tokens": pages * cache.PAGE_SIZE, "device": device, "dtype": model.compute_dtype}
    pool = cache.PagePool(model.config, model.parallel, **how)

    def logits_of(tokens: list[list[int]], sequences: list[cache.Sequence]) -> torch.Tensor:
        held = cache.KVCache(pool, sequences, [len(each) for each in tokens])
        training = model.training
        model.eval()
        try:
            return model(torch.tensor(tokens, device=device), cache=held, last_only=True)[:, -1].float()
        finally:
            model.train(training)

    texts: list[tuple[int, ...]] = [()]
    sums, sequences = torch.zeros(1, device=device), [cache.Sequence(pool)]
    finished: list[Hypothesis] = []
    logits = logits_of([list(prompt)], sequences)
    for length in range(1, steps + 1):
        table = torch.log_softmax(logits, dim=-1)
        if penalty.penalises:
            table = torch.stack([penalise(row, penalty, prompt, text) for row, text in zip(table, texts, strict=True)])
        table = (table + sums[:, None]).flatten()
        # Enough that `beams` unfinished ones remain whatever ends here.
        best, places = table.topk(min(table.numel(), beams * max(2, 1 + len(stops))))
        last = length == steps
        candidates = []
        for rank, (value, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, logits.shape[-1])
            ends = token in stops
            if ends or last:
                if rank < beams:
                    finish = STOP if ends else LENGTH
                    text = (*texts[parent], token)
                    finished.append(Hypothesis(text, value, value / length**length_penalty, finish))
            elif len(candidates) < beams:
                candidates.append((parent, token, value))
        finished = sorted(finished, key=lambda each: -each.score)[:beams]
        if last or not candidates:
            break
        if len(finished) == beams and candidates[0][2] / length**length_penalty <= finished[-1].score:
            break
        sequences = _extend(sequences, [parent for parent, _, _ in candidates])
        texts = [(*texts[parent], token) for parent, token, _ in candidates]
        sums = torch.tensor([value for _, _, value in candidates], device=device)
        logits = logits_of([[token] for _, token, _ in candidates], sequences)
    return finished


def _extend(sequences: list[cache.Sequence], parents: list[int]) -> list[cache.Sequence]:
    """The sequence of each parent: itself for its first child, a fork for every other. Those without a child end."""
    for i, sequence in enumerate(sequences):
        if i not in parents:
            sequence.close()
    first = {parent: i for i, parent in reversed(list(enumerate(parents)))}
    return [sequences[p] if first[p] == i else sequences[p].fork() for i, p in enumerate(parents)]
