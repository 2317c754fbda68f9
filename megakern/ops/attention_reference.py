"""The meaning of attention in plain PyTorch: dense scores, an explicit mask, any dtype including float64."""

from __future__ import annotations

import torch

from megakern.ops.dropout import keep_reference


def distances(T: int, S: int) -> torch.Tensor:
    """int64 (T, S): of key j from the key beside query t, which is t + S - T; negative: the past."""
    return torch.arange(S) - (torch.arange(T)[:, None] + S - T)


def visible_keys(T: int, S: int, causal: bool, window: tuple[int | None, int | None] | None) -> torch.Tensor:
    """bool (T, S): may query t see key j?"""
    distance = distances(T, S)
    visible = torch.ones(T, S, dtype=torch.bool)
    left, right = (None, None) if window is None else window
    if causal:
        visible &= distance <= 0
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def attention_reference(
    q,
    k,
    v,
    *,
    causal=True,
    window=None,
    softcap=0.0,
    scale=None,
    alibi_slopes=None,
    sinks=None,
    dropout_p=0.0,
    seed=None,
    dropout_offset=(0, 0),
    cu_seqlens=None,
    return_lse=False,
):
    """Same arguments, shapes and results as `megakern.ops.attention.attention`; dropout is a slow Python loop."""
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale, "dropout_p": dropout_p}
    options["sinks"] = sinks
    if cu_seqlens is None:
        first = {"first_sample": dropout_offset[0], "first_head": dropout_offset[1]}
        out, lse = _dense(q, k, v, slopes=alibi_slopes, seed=seed, **first, **options)
        return (out, lse) if return_lse else out
    q_ends, k_ends = (offsets.tolist() for offsets in cu_seqlens)
    outs, lses = [q[:0]], [q[:0, :, 0].t().to(_lse_dtype(q))]
    for i in range(len(q_ends) - 1):
        queries, keys = slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])
        first = {"first_sample": dropout_offset[0] + i, "first_head": dropout_offset[1]}
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[i]
        out, lse = _dense(q[None, queries], k[None, keys], v[None, keys], slopes=slopes, seed=seed, **first, **options)
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_lse else out


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _dense(q, k, v, *, causal, window, softcap, scale, slopes, sinks, dropout_p, seed, first_sample, first_head):
    B, T, H, D = q.shape
    S, G = k.shape[1], H // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.to(scores)[..., None, None] * distances(T, S).abs().to(scores)
    visible = visible_keys(T, S, causal, window).to(q.device)
    scores = scores.to(_lse_dtype(q)).masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, -1) if S > 0 else scores.new_full((B, H, T), -torch.inf)
    blind = ~visible.any(-1, keepdim=True)  # (T, 1); these rows would be NaN
    if sinks is None:
        p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0).to(q.dtype)
    else:
        scores = torch.cat([scores, sinks.to(scores)[:, None, None].expand(B, H, T, 1)], -1)
        lse, p = torch.logsumexp(scores, -1), torch.softmax(scores, -1)[..., :-1].to(q.dtype)
    if dropout_p:
        p = p * (_keep(dropout_p, seed, B, H, T, S, first_sample, first_head).to(p) / (1.0 - dropout_p))
    return torch.einsum("bhts,bshd->bthd", p, v), lse.detach()


def _keep(p, seed, B, H, T, S, first_sample, first_head) -> torch.Tensor:
    """The dropout mask (B, H, T, S): key chain (sample, head, query), column key; see `megakern/ops/dropout.py`."""
    kept = [
        keep_reference(p, seed, (first_sample + b, first_head + h, t), j)
        for b in range(B)
        for h in range(H)
        for t in range(T)
        for j in range(S)
    ]
    return torch.tensor(kept, dtype=torch.bool).view(B, H, T, S)
