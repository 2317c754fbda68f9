"""Text generation, one token for each row at a time: greedy, or sampled after temperature, top-k and top-p.

The random number of row b at step t is a function of (seed, b, t), and every tp rank has the same logits, so all ranks
choose the same token without talking, and a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from megakern.model.cache import KVCache
from megakern.model.gpt import GPT
from megakern.parallel.random import fold, uniform

STOPPED, MAX_NEW_TOKENS, SEQUENCE_LENGTH = "stopped", "max_new_tokens", "sequence_length"


def sampling_probabilities(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """logits (B, V) -> probabilities (B, V) float64 of softmax(logits / temperature) after both filters.

    top_k keeps the k likeliest tokens (the lower id first among equals). top_p then keeps the fewest likeliest tokens
    whose probabilities, after top_k, reach p (arXiv 1904.09751). At least one token stays.
    """
    scaled = logits.double() / temperature
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probabilities = torch.softmax(ordered, dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        before[:, 0] = 0.0
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def _choose(logits: torch.Tensor, step: int, temperature, top_k, top_p, seed: int) -> torch.Tensor:
    """logits (B, V) -> tokens (B,), on the logits' device."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = torch.arange(logits.shape[0], device=logits.device)
    cumulative = probabilities.cumsum(dim=-1)
    # Scaled by the last sum, which rounding leaves near 1, so that the search ends at a token that can be chosen.
    point = uniform(fold(seed, "generate", step), rows).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def generate(
    model: GPT,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    cache: bool = True,
) -> Generator[torch.Tensor, None, str]:
    """Continue prompt (B, T) int64: yields the next tokens (B,) int64, one step after the other.

    temperature 0 takes the likeliest token. A row that has produced a stop token repeats it while others go on. The
    generator returns why it ended: "stopped" (every row), "max_new_tokens", or "sequence_length" (the model is full).
    Dropout is off while it runs. Raises ValueError, before anything runs, for an empty or too long prompt or an option
    out of range.
    """
    if prompt.ndim != 2 or prompt.numel() == 0 or prompt.dtype != torch.int64:
        raise ValueError(f"generate: prompt must be (B, T) int64, not empty, got {tuple(prompt.shape)} {prompt.dtype}")
    limit = model.config.sequence_length
    if prompt.shape[1] >= limit:
        raise ValueError(
            f"generate: a prompt of {prompt.shape[1]} tokens leaves no room in the model's sequence_length of {limit}; "
            f"pass its last {limit - 1} tokens or fewer"
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be 1 or more, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"generate: temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    return _generate(model, prompt, max_new_tokens, (temperature, top_k, top_p, seed), tuple(stop_tokens), cache)


def _generate(model, prompt, max_new_tokens: int, options: tuple, stop_tokens: tuple[int, ...], cached: bool):
    B, T = prompt.shape
    steps = min(max_new_tokens, model.config.sequence_length - T)
    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=prompt.device)
    stopped = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    cache = None
    if cached:
        how = {"device": prompt.device, "dtype": model.compute_dtype}
        cache = KVCache(model.config, model.parallel, batch=B, capacity=T + steps - 1, **how)
    tokens, last = prompt, prompt[:, -1]
    for step in range(steps):
        chosen = _choose(_last_logits(model, tokens, cache), step, *options)
        last = torch.where(stopped, last, chosen)
        stopped |= torch.isin(last, stops)
        yield last
        if bool(stopped.all()):
            return STOPPED
        tokens = last[:, None] if cached else torch.cat([tokens, last[:, None]], dim=1)
    return MAX_NEW_TOKENS if steps == max_new_tokens else SEQUENCE_LENGTH


@torch.no_grad()
def _last_logits(model: GPT, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
    """(B, V) fp32. The model's mode is changed only within this call: a generator may never be run to its end."""
    training = model.training
    model.eval()
    try:
        return model(tokens, cache=cache, last_only=True)[:, -1].float()
    finally:
        model.train(training)
