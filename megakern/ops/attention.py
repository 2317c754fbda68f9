"""Softmax attention: causal, full or windowed; grouped heads; score cap; dropout; padded or packed sequences.

    s[t, j] = scale * q[t] . k[j]                     softcap > 0: s = softcap * tanh(s / softcap)    arXiv 2408.00118
    ALiBi: s[t, j] -= slope[head] |j - (t + S - T)|, after the cap                                    arXiv 2108.12409
    row t stands beside key t + S - T (bottom right); it sees key j when  -left <= j - (t + S - T) <= right
    p[t, :] = softmax of s[t, :] over its visible keys;  lse[t] = log sum exp of the same scores      arXiv 1706.03762
    sinks: one more score z[head] among those, of a key that is never there and has no value         arXiv 2508.10925
    out[t]  = sum_j p[t, j] keep[t, j] / (1 - dropout_p) v[j]

    dv = (p keep)^T dout       dp = keep (dout v^T)       ds = p (dp - sum_j p dp)
    dq = scale ds k            dk = scale ds^T q          (keep includes 1 / (1 - dropout_p))
    dz = -sum of exp(z - lse[t]) dout[t] . out[t] over samples and rows

With sinks kernels compute as without: out and lse follow from theirs by one factor a row, and from those the gradients,
as p = exp(s - lse) and sum_j p dp = dout . out.

q (B, T, H, D); k, v (B, S, Hkv, D); Hkv divides H, G = H / Hkv: query heads h G to h G + G - 1 share key-value head h
(arXiv 2305.13245). Packed: q (T, H, D), k, v (S, Hkv, D) of all N sequences, int32 offsets (N + 1,). A row that sees no
key has out 0, lse -inf (with sinks z) and no gradient. Saved for backward: q, k, v, out, lse (flash attention, arXiv
2205.14135). Nothing crosses ranks: heads are independent.

The dropout mask is the one of `megakern/ops/dropout.py`, with the sample, the query head and the query folded into the
row key, each as an index in the whole batch and model (`dropout_offset` is added to sample and head), and key j as
column. Packed sequences count as samples; queries and keys count from the start of their sequence.
"""

from __future__ import annotations

import torch

from megakern.ops import autocast, checks
from megakern.ops.dispatch import Problem, describes, launcher, register, resolve
from megakern.ops.dropout import check_rate_and_seed

UNLIMITED = -1  # a side of the window, inside the custom op


@describes("attention")
def _problem(
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
    deterministic=False,
    return_lse=False,
) -> Problem:
    sizes = {"D": q.shape[-1], "H": q.shape[-2], "Hkv": k.shape[-2], "T": q.shape[-3], "S": k.shape[-3]}
    options = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "alibi": alibi_slopes is not None,
        "dropout": dropout_p > 0,
        "positive_scale": scale is None or scale > 0,
        "packed": cu_seqlens is not None,
        "deterministic": deterministic,
    }
    return Problem("attention", q.device.type, q.dtype, sizes, options)


# --- checks ---


def _check(q, k, v, window, softcap, alibi_slopes, dropout_p, seed, dropout_offset, cu_seqlens) -> None:
    rank, letters = (4, "(B, T, H, D)") if cu_seqlens is None else (3, "(T, H, D) with cu_seqlens")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if getattr(tensor, "ndim", None) != rank:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"attention: {name} must have shape {letters}, got {found}")
    checks.floating("attention", q=q, k=k, v=v)
    D, H, Hkv = q.shape[-1], q.shape[-2], k.shape[-2]
    if D == 0 or k.shape[-1] != D:
        raise ValueError(f"attention: q and k must have the same head dim, at least 1, got {D} and {k.shape[-1]}")
    checks.shape("attention", "v", v, tuple(k.shape), "of k", "keys and values come in pairs of one head dim")
    if Hkv == 0 or H % Hkv != 0:
        raise ValueError(f"attention: the heads of k, Hkv = {Hkv}, must divide the heads of q, H = {H}")
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: q and k must have the same batch size, got {q.shape[0]} and {k.shape[0]}")
    if cu_seqlens is not None:
        _check_packed(q, k, cu_seqlens)
    check_window_and_cap("attention", window, softcap)
    if alibi_slopes is not None:
        check_slopes("attention", q, q.shape[0] if cu_seqlens is None else cu_seqlens[0].shape[0] - 1, alibi_slopes)
    check_rate_and_seed("attention", "dropout_p", dropout_p, seed)
    if len(dropout_offset) != 2 or min(dropout_offset) < 0:
        raise ValueError(
            f"attention: dropout_offset must be (first sample, first head), both at least 0, got {dropout_offset}"
        )


def check_window_and_cap(op: str, window, softcap) -> None:
    pair = window is None or (isinstance(window, (tuple, list)) and len(window) == 2)
    if not pair or any(side is not None and side < 0 for side in window or ()):
        raise ValueError(f"{op}: window must be (left, right), each None or at least 0, got {window}")
    if not softcap >= 0.0:
        raise ValueError(f"{op}: softcap must be at least 0 (0: none), got {softcap}")


def check_slopes(op: str, q, B: int, slopes) -> None:
    """B: samples, or packed sequences."""
    H = q.shape[-2]
    if slopes.dtype != torch.float32 or tuple(slopes.shape) not in ((H,), (B, H)):
        raise ValueError(
            f"{op}: alibi_slopes must be float32 of shape (H,) = ({H},) or (B, H) = ({B}, {H}), "
            f"got {slopes.dtype} {tuple(slopes.shape)}"
        )
    checks.same_device(op, "q", q, "alibi_slopes", slopes)
    if slopes.requires_grad:
        raise ValueError(f"{op}: alibi_slopes get no gradient; pass alibi_slopes.detach()")


def check_sinks(op: str, q, sinks) -> None:
    H = q.shape[-2]
    checks.shape(op, "sinks", sinks, (H,), "(H,)", "a score for each head of q")
    checks.same_or_fp32(op, "q", q, sinks=sinks)


def _check_packed(q, k, cu_seqlens) -> None:
    if not isinstance(cu_seqlens, (tuple, list)) or len(cu_seqlens) != 2:
        raise TypeError(
            "attention: cu_seqlens must be a pair (q_offsets, k_offsets) of tensors; pass the same one twice"
        )
    for name, offsets, tensor in zip(("q_offsets", "k_offsets"), cu_seqlens, (q, k), strict=True):
        if offsets.dtype != torch.int32 or offsets.ndim != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"attention: {name} must be int32 of shape (sequences + 1,), got {offsets.dtype} {tuple(offsets.shape)}"
            )
        checks.same_device("attention", "q", q, name, offsets)
        if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = offsets.tolist()
            if ends[0] != 0 or ends[-1] != tensor.shape[0] or ends != sorted(ends):
                raise ValueError(
                    f"attention: {name} must rise from 0 to the number of rows, {tensor.shape[0]}, got {ends}"
                )
    if cu_seqlens[0].shape != cu_seqlens[1].shape:
        lengths = [offsets.shape[0] for offsets in cu_seqlens]
        raise ValueError(f"attention: q_offsets and k_offsets must be of one length, got {lengths[0]} and {lengths[1]}")


# --- custom ops; window (left, right) with UNLIMITED, dropout_key (seed, first sample, first head) ---

_HOW = (
    "Tensor? q_offsets, Tensor? k_offsets, Tensor? slopes, SymInt[] window, float scale, float softcap, "
    "float dropout_p, SymInt[] dropout_key, bool deterministic, str backend"
)


def _forward(q, k, v, q_offsets, k_offsets, slopes, *how_and_backend):
    *how, backend = how_and_backend
    return launcher(backend, "attention", "attention_forward")(q, k, v, q_offsets, k_offsets, slopes, *how)


def _fake(q, k, v, *rest):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=wide)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward(dout, q, k, v, out, lse, q_offsets, k_offsets, slopes, *how_and_backend):
    *how, backend = how_and_backend
    tensors = (dout, q, k, v, out, lse, q_offsets, k_offsets, slopes)
    return launcher(backend, "attention", "attention_backward")(*tensors, *how)


def _backward_fake(dout, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_attention_backward = register(
    "attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW}) -> (Tensor, Tensor, Tensor)",
    forward=_backward,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, q_offsets, k_offsets, slopes, *ctx.how = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, q_offsets, k_offsets, slopes)
    ctx.mark_non_differentiable(lse)


def _autograd_backward(ctx, dout, _dlse):
    dq, dk, dv = _attention_backward(dout, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, *[None] * 10


_attention = register(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


# The same for [q, k, v] of each head side by side: the gradient is one tensor, and nothing is put together behind it.

_QKV_HOW = (
    "SymInt[] window, float scale, float softcap, float dropout_p, SymInt[] dropout_key, bool deterministic, "
    "str backend"
)


def _qkv_forward(qkv, *how_and_backend):
    return _forward(*qkv.unbind(3), None, None, None, *how_and_backend)


def _qkv_backward(dout, qkv, out, lse, *how_and_backend):
    *how, backend = how_and_backend
    if backend == "torch":  # which has a kernel that writes to strides
        return launcher(backend, "attention", "attention_qkv_backward")(dout, qkv, out, lse, *how)
    return torch.stack(_backward(dout, *qkv.unbind(3), out, lse, None, None, None, *how_and_backend), 3)


_attention_qkv_backward = register(
    "attention_qkv_backward",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_QKV_HOW}) -> Tensor",
    forward=_qkv_backward,
    fake=lambda dout, qkv, *rest: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)


def _qkv_setup_context(ctx, inputs, output):
    qkv, *ctx.how = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _qkv_autograd_backward(ctx, dout, _dlse):
    return _attention_qkv_backward(dout, *ctx.saved_tensors, *ctx.how), *[None] * 7


_attention_qkv = register(
    "attention_qkv",
    f"(Tensor qkv, {_QKV_HOW}) -> (Tensor, Tensor)",
    forward=_qkv_forward,
    fake=lambda qkv, *rest: _fake(*qkv.unbind(3)),
    setup_context=_qkv_setup_context,
    backward=_qkv_autograd_backward,
)


def attention_qkv(
    qkv, *, causal=True, window=None, dropout_p=0.0, seed=None, dropout_offset=(0, 0), deterministic=False, backend=None
):
    """`attention` of qkv (B, T, H, 3, D), each head's [q, k, v] -> (B, T, H, D), with a gradient in one piece.

    Options and errors are those of `attention`.
    """
    if qkv.ndim != 5 or qkv.shape[3] != 3:
        raise ValueError(f"attention: qkv must have shape (B, T, H, 3, D), got {tuple(qkv.shape)}")
    low = autocast.autocast_dtype(qkv)
    if low is not None:
        qkv = qkv.to(low)
    q, k, v = qkv.unbind(3)
    _check(q, k, v, window, 0.0, None, dropout_p, seed, dropout_offset, None)
    options = {"causal": causal, "window": window, "dropout_p": dropout_p, "deterministic": deterministic}
    chosen = resolve(_problem(q, k, v, **options), backend)
    key = [seed or 0, *dropout_offset]
    out, _ = _attention_qkv(
        qkv, list(_sides(causal, window)), q.shape[-1] ** -0.5, 0.0, float(dropout_p), key, deterministic, chosen
    )
    return out


def _sides(causal, window) -> tuple[int, int]:
    left, right = (UNLIMITED if side is None else side for side in (window or (None, None)))
    return left, 0 if causal else right


# --- with sinks ---


def with_sinks(out, lse, sinks):
    """out, lse of a softmax over keys alone -> out, changed in place, and lse with the sinks among the scores."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    keys = torch.exp(lse - total).masked_fill_(lse == -torch.inf, 0.0)  # what they have of the probability
    return out.mul_(keys.transpose(-1, -2)[..., None]), total


def _sinks_forward(q, k, v, sinks, *rest):
    return with_sinks(*_forward(q, k, v, *rest), sinks)


def _sinks_backward(dout, q, k, v, sinks, out, lse, q_offsets, k_offsets, slopes, *how_and_backend):
    *how, backend = how_and_backend
    tensors = (dout, q, k, v, out, lse, q_offsets, k_offsets, slopes)
    dq, dk, dv = launcher(backend, "attention", "attention_backward")(*tensors, *how, sunk=True)
    along = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)  # (..., H, T)
    dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * along).transpose(0, -2).flatten(1).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)


_attention_sinks_backward = register(
    "attention_sinks_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor out, Tensor lse, {_HOW})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_sinks_backward,
    fake=lambda dout, q, k, v, sinks, *rest: (*_backward_fake(dout, q, k, v), torch.empty_like(sinks)),
)


def _sinks_setup_context(ctx, inputs, output):
    q, k, v, sinks, q_offsets, k_offsets, slopes, *ctx.how = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, sinks, out, lse, q_offsets, k_offsets, slopes)
    ctx.mark_non_differentiable(lse)


def _sinks_autograd_backward(ctx, dout, _dlse):
    return *_attention_sinks_backward(dout, *ctx.saved_tensors, *ctx.how), *[None] * 10


_attention_sinks = register(
    "attention_sinks",
    f"(Tensor q, Tensor k, Tensor v, Tensor sinks, {_HOW}) -> (Tensor, Tensor)",
    forward=_sinks_forward,
    fake=lambda q, k, v, sinks, *rest: _fake(q, k, v, *rest),
    setup_context=_sinks_setup_context,
    backward=_sinks_autograd_backward,
)


def attention(
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
    deterministic=False,
    return_lse=False,
    backend=None,
):
    """softmax(scale q k^T) v over the keys each query may see.

    q (B, T, H, D); k, v (B, S, Hkv, D) of one dtype, Hkv divides H. Packed: q (T, H, D), k, v (S, Hkv, D) and
    cu_seqlens = (q_offsets, k_offsets), int32 (sequences + 1,). Returns out like q; with return_lse (out, lse), lse
    (B, H, T), packed (H, T), fp32 (fp64 for fp64), through which no gradient flows.

    causal: a query sees no later key; aligned to the bottom right, so the last query sees the last key.
    window (left, right): at most so many keys before and after the own one, None without a limit; causal makes right 0.
    softcap: 0, or scores become softcap * tanh(score / softcap). scale: default 1 / sqrt(D).
    alibi_slopes: fp32 (H,), or (B, H) with B samples or packed sequences; a score loses slope * |distance to the own
    key|, and no gradient flows to them.
    sinks (H,), of q's dtype or fp32: a score of each head for no key, neither scaled nor capped, so that a row need not
    look anywhere. A gradient flows to them.
    dropout_p in [0, 1) of the probabilities; it needs a seed (int, below 2**63), a new one for each step and layer.
    dropout_offset (first sample, first head) of this rank in the whole batch and of all heads.
    deterministic: gradients have the same bits at each run. Without it the C++ backward pass may add dq in any order.
    Raises ValueError or TypeError on other shapes, dtypes, devices and values.
    """
    low = autocast.autocast_dtype(q)
    if low is not None:
        q, k, v = autocast.narrow(low, q, k, v)
        (sinks,) = autocast.readable(low, sinks)
    _check(q, k, v, window, softcap, alibi_slopes, dropout_p, seed, dropout_offset, cu_seqlens)
    if sinks is not None:
        check_sinks("attention", q, sinks)
    problem = _problem(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        cu_seqlens=cu_seqlens,
        deterministic=deterministic,
    )
    chosen = resolve(problem, backend)
    q_offsets, k_offsets = (None, None) if cu_seqlens is None else cu_seqlens
    op, tensors = (_attention, (q, k, v)) if sinks is None else (_attention_sinks, (q, k, v, sinks))
    out, lse = op(
        *tensors,
        q_offsets,
        k_offsets,
        alibi_slopes,
        list(_sides(causal, window)),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        float(softcap),
        float(dropout_p),
        [seed or 0, *dropout_offset],
        deterministic,
        chosen,
    )
    return (out, lse) if return_lse else out
