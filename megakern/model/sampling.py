"""From logits to the next token: greedy, or drawn after penalties, temperature, top-k and top-p.

A draw is a function of (seed, position in its text) and of the row's own logits: neither the batch around it nor the
layout matters, every tp rank draws the same without talking, and a run repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megakern.config import require
from megakern.parallel.random import fold


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one text are chosen. Raises ConfigError for a value out of range."""

    temperature: float = 0.0
    """0: the likeliest token (the lowest id among equals). Else logits are divided by it."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities, after top_k, reach this (arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1: positive logits of tokens that are in the text, prompt included, are divided by it, negative ones
    multiplied (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were made, the prompt not counted."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it was made."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < float("inf"), f"temperature must be 0 (greedy) or more, got {self.temperature}")
        require(self.top_k is None or self.top_k >= 1, f"top_k must be 1 or more, got {self.top_k}")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty must be above 0 (1: none), got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2], got {getattr(self, name)}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def point(self, position: int) -> float:
        """In (0, 1): where the draw for the token at `position` of the text lies; 53 random bits."""
        return ((fold(self.seed, "generate", position) >> 10) + 0.5) * 2.0**-53


def penalise(logits: torch.Tensor, sampling: Sampling, prompt: Sequence[int], made: Sequence[int]) -> torch.Tensor:
    """logits (V,) -> (V,), changed for the tokens of the text by the three penalties."""
    logits = logits.clone()

    def ids(tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

    if sampling.repetition_penalty != 1:
        seen = ids([*prompt, *made]).unique()
        old, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if made:
        tokens, times = ids(made).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return logits


def probabilities(logits: torch.Tensor, sampling: Sequence[Sampling]) -> torch.Tensor:
    """logits (B, V), one `Sampling` a row, temperature above 0 -> (B, V) float64: softmax after the filters.

    At least one token of a row stays; among equals the lower id comes first.
    """
    device, V = logits.device, logits.shape[-1]
    temperature = torch.tensor([each.temperature for each in sampling], dtype=torch.float64, device=device)
    scaled = logits.double() / temperature[:, None]
    filtered = [i for i, each in enumerate(sampling) if each.top_k is not None or each.top_p is not None]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        top_k = torch.tensor([sampling[i].top_k or V for i in filtered], device=device)
        top_p = torch.tensor([2.0 if sampling[i].top_p is None else sampling[i].top_p for i in filtered], device=device)
        ordered, order = torch.sort(scaled[rows], dim=-1, descending=True, stable=True)
        ordered.masked_fill_(torch.arange(V, device=device) >= top_k[:, None], -torch.inf)
        likely = torch.softmax(ordered, dim=-1)
        before = likely.cumsum(dim=-1) - likely
        before[:, 0] = 0.0
        ordered.masked_fill_(before >= top_p[:, None].double(), -torch.inf)
        scaled[rows] = ordered.gather(-1, order.argsort(dim=-1))
    return torch.softmax(scaled, dim=-1)


def choose(logits: torch.Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """logits (B, V) after penalties -> the token of each row, which will stand at `positions` of its text."""
    chosen = logits.argmax(dim=-1)
    drawn = [i for i, each in enumerate(sampling) if each.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        cumulative = probabilities(logits[rows], [sampling[i] for i in drawn]).cumsum(dim=-1)
        points = [sampling[i].point(positions[i]) for i in drawn]
        points = torch.tensor(points, dtype=torch.float64, device=logits.device)[:, None]
        # Scaled by the last sum, which rounding leaves near 1, so that the search ends at a token that can be chosen.
        found = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
        chosen[rows] = found.squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    return chosen.tolist()
