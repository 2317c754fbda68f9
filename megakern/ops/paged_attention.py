"""Attention of new queries over a cache of keys and values that lies in pages, for generation. No gradient.

q (B, T, H, D): the T last tokens of each sequence; k_cache, v_cache (pages, page_size, Hkv, D), of all sequences;
block_table (B, P) int32: page i of sequence b is block_table[b, i]; lengths (B,) int32: its keys, those of the T new
tokens included. Key j of sequence b is row j % page_size of page block_table[b, j // page_size]. Masks, cap, ALiBi and
lse are those of `megakern/ops/attention.py`: query t stands beside key t + lengths[b] - T. Entries of the table behind
a sequence's last page, and rows behind its last key, are never read. (Paged attention: arXiv 2309.06180.)
"""

from __future__ import annotations

import torch

from megakern.ops import autocast, checks
from megakern.ops.attention import UNLIMITED, check_sinks, check_slopes, check_window_and_cap, with_sinks
from megakern.ops.attention_reference import attention_reference
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve


def paged_attention_reference(
    q, k_cache, v_cache, block_table, lengths, *, causal=True, window=None, softcap=0.0, scale=None, alibi_slopes=None,
    sinks=None, return_lse=False,
):  # fmt: skip
    """Same arguments, shapes and results as `paged_attention`: pages are gathered, one sequence at a time."""
    outs, lses = [q[:0]], [q[:0, 0].new_empty(0, q.shape[2], q.shape[1], dtype=_lse_dtype(q))]
    for b, length in enumerate(lengths.tolist()):
        pages = block_table[b, : -(-length // k_cache.shape[1])].long()
        k, v = (cache[pages].flatten(0, 1)[None, :length] for cache in (k_cache, v_cache))
        out, lse = attention_reference(
            q[b : b + 1], k, v, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks,
            return_lse=True,
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b],
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if return_lse else out


def _lse_dtype(q) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@describes("paged_attention")
def _problem(
    q, k_cache, v_cache, block_table, lengths, *, causal=True, window=None, softcap=0.0, scale=None, alibi_slopes=None,
    sinks=None, return_lse=False,
) -> Problem:  # fmt: skip
    sizes = {"D": q.shape[-1], "H": q.shape[-2], "Hkv": k_cache.shape[-2], "T": q.shape[-3], "P": block_table.shape[-1]}
    sizes["page_size"] = k_cache.shape[1]
    options = {"causal": causal, "window": window, "softcap": softcap, "alibi": alibi_slopes is not None}
    return Problem("paged_attention", q.device.type, q.dtype, sizes, options)


def _check(q, k_cache, v_cache, block_table, lengths, window, softcap, alibi_slopes) -> None:
    op = "paged_attention"
    for name, x, letters in (
        ("q", q, "(B, T, H, D)"),
        ("k_cache", k_cache, "(pages, page_size, Hkv, D)"),
        ("v_cache", v_cache, "(pages, page_size, Hkv, D)"),
    ):
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} must have shape {letters}, got {tuple(x.shape)}")
    checks.floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
    checks.shape(op, "v_cache", v_cache, tuple(k_cache.shape), "of k_cache", "keys and values come in pairs")
    (B, _, H, D), (_, page_size, Hkv, cache_D) = q.shape, k_cache.shape
    if D == 0 or cache_D != D:
        raise ValueError(f"{op}: q and k_cache must have the same head dim, at least 1, got {D} and {cache_D}")
    if Hkv == 0 or H % Hkv != 0:
        raise ValueError(f"{op}: the heads of k_cache, Hkv = {Hkv}, must divide the heads of q, H = {H}")
    if page_size == 0 or page_size & (page_size - 1):
        raise ValueError(f"{op}: the page size must be a power of two, got {page_size}")
    for name, x, shape in (("block_table", block_table, (B, None)), ("lengths", lengths, (B,))):
        fits = x.ndim == len(shape) and x.shape[0] == B
        if x.dtype != torch.int32 or not fits:
            wanted = "(B, pages of the longest)" if name == "block_table" else "(B,)"
            raise ValueError(
                f"{op}: {name} must be int32 of shape {wanted} with B = {B}, got {x.dtype} {tuple(x.shape)}"
            )
        checks.same_device(op, "q", q, name, x)
    check_window_and_cap(op, window, softcap)
    if alibi_slopes is not None:
        check_slopes(op, q, B, alibi_slopes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError(f"{op}: it has no gradient; call it under torch.no_grad(), or mk.attention for training")
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and B > 0:
        _check_values(k_cache, block_table, lengths)


def _check_values(k_cache, block_table, lengths) -> None:
    """Where reading them costs no synchronisation."""
    (pages, page_size), most = k_cache.shape[:2], block_table.shape[1]
    if lengths.min() < 0 or lengths.max() > most * page_size:
        raise ValueError(
            f"paged_attention: lengths must be between 0 and {most * page_size}, the keys of {most} pages, "
            f"got {lengths.tolist()}"
        )
    used = torch.arange(most) * page_size < lengths[:, None]
    named = block_table[used]
    if named.numel() and (named.min() < 0 or named.max() >= pages):
        raise ValueError(
            f"paged_attention: pages named in block_table must be between 0 and {pages - 1}, got "
            f"{named.min().item()} to {named.max().item()}"
        )


def _forward(q, k_cache, v_cache, block_table, lengths, slopes, window, scale, softcap, backend):
    return launcher(backend, "paged_attention", "paged_attention")(
        q, k_cache, v_cache, block_table, lengths, slopes, window, scale, softcap
    )


def _fake(q, *rest):
    B, T, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, T), dtype=_lse_dtype(q))


_paged_attention = register(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths, Tensor? slopes, SymInt[] window, "
    "float scale, float softcap, str backend) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
)


def paged_attention(
    q, k_cache, v_cache, block_table, lengths, *, causal=True, window=None, softcap=0.0, scale=None, alibi_slopes=None,
    sinks=None, return_lse=False, backend=None,
):  # fmt: skip
    """softmax(scale q k^T) v over the cached keys each query may see; shapes in the docstring of this file.

    Returns out like q; with return_lse (out, lse), lse (B, H, T) in fp32 (fp64 for fp64). The other arguments are those
    of `mk.attention`. Raises ValueError or TypeError on other shapes, dtypes, devices and values, and on tensors that
    want a gradient; on a GPU the values of block_table and lengths are not looked at. Under autocast q is cast to the
    caches' dtype, which may be large, and out to autocast's.
    """
    low = autocast.autocast_dtype(q)
    if low is not None:
        (q,) = autocast.narrow(k_cache.dtype, q)
        (sinks,) = autocast.readable(q.dtype, sinks)
    _check(q, k_cache, v_cache, block_table, lengths, window, softcap, alibi_slopes)
    if sinks is not None:
        check_sinks("paged_attention", q, sinks)
    problem = _problem(
        q, k_cache, v_cache, block_table, lengths, causal=causal, window=window, softcap=softcap, scale=scale,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    chosen = resolve(problem, backend)
    left, right = (UNLIMITED if side is None else side for side in (window or (None, None)))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    sides = [left, 0 if causal else right]
    out, lse = _paged_attention(
        q, k_cache, v_cache, block_table, lengths, alibi_slopes, sides, scale, float(softcap), chosen
    )
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks.detach())
    out = out if low is None else out.to(low)
    return (out, lse) if return_lse else out
