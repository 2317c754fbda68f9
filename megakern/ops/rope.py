"""Rotary position embedding of queries and keys (Su et al. 2021, arXiv 2104.09864).

Pairs of elements are rotated by an angle that grows with the position t; a pair is

    rotate-half (Llama in Hugging Face's layout):  (x[i], x[i + d])        i = 0 .. d - 1
    interleaved (GPT-J, RoFormer):                 (x[2 i], x[2 i + 1])

    y_first  = x_first cos[t, i] - x_second sin[t, i]
    y_second = x_second cos[t, i] + x_first sin[t, i]

q (B, T, H, D), k (B, T, Hkv, D), cos and sin (Tmax, d) with 2 d <= D; elements from 2 d on are copied (partial rotary).
The backward pass is the rotation by minus the angle, with the same launcher. Saved: cos, sin, positions. Computed in
fp32 (fp64 for fp64) and rounded once. Nothing crosses ranks. In place, the same launchers write over q and k, which no
backward pass needs.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from megakern.ops import autocast, checks
from megakern.ops.dispatch import LIBRARY, Problem, describes, launcher, register, resolve


def rope_reference(q, k, cos, sin, *, positions=None, interleaved=False):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    t = torch.arange(q.shape[1], device=q.device) if positions is None else positions.long()
    cos, sin = cos.to(wide)[t].unsqueeze(-2), sin.to(wide)[t].unsqueeze(-2)
    d = cos.shape[-1]

    def rotate(x):
        turned = x[..., : 2 * d].to(wide)
        first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :d], turned[..., d:])
        y = first * cos - second * sin, second * cos + first * sin
        y = torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)
        return torch.cat([y.to(x.dtype), x[..., 2 * d :]], -1)

    return rotate(q), rotate(k)


@describes("rope")
def _problem(q, k, cos, sin, *, positions=None, interleaved=False, in_place=False) -> Problem:
    sizes = {"D": q.shape[-1], "D_rot": 2 * cos.shape[-1], "H": q.shape[-2], "Hkv": k.shape[-2]}
    return Problem("rope", q.device.type, q.dtype, sizes, {"interleaved": interleaved, "in_place": in_place})


def _check(q, k, cos, sin, positions) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4 or tensor.shape[-1] == 0:
            raise ValueError(f"rope: {name} must have shape (B, T, H, D) with D > 0, got {tuple(tensor.shape)}")
    checks.floating("rope", q=q, k=k)
    B, T, _, D = q.shape
    checks.shape("rope", "k", k, (B, T, k.shape[2], D), "(B, T, Hkv, D)", "q and k are rotated at the same positions")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 2 or not 0 < 2 * table.shape[1] <= D:
            raise ValueError(
                f"rope: {name} must have shape (Tmax, d) with 0 < 2 d <= D = {D}, got {tuple(table.shape)}; "
                f"one column for each rotated pair"
            )
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rope: {name} must be float32 or float64, got {table.dtype}; angles need the precision")
        if table.requires_grad:
            raise ValueError(f"rope: {name} must not require a gradient, none is computed; pass {name}.detach()")
        checks.same_device("rope", "q", q, name, table)
    checks.shape("rope", "sin", sin, tuple(cos.shape), "of cos")
    if positions is not None:
        _check_positions(positions, q, cos.shape[0])
    elif cos.shape[0] < T:
        raise ValueError(f"rope: cos and sin have {cos.shape[0]} positions, too few for T = {T}; make longer tables")


def _check_positions(positions, q, Tmax) -> None:
    B, T = q.shape[:2]
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rope: positions must be int32 or int64, got {positions.dtype}")
    if tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(f"rope: positions must have shape {(T,)} or {(B, T)}, got {tuple(positions.shape)}")
    checks.same_device("rope", "q", q, "positions", positions)
    if positions.device.type == "cpu" and positions.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= Tmax:
            raise ValueError(
                f"rope: positions must lie in 0 .. {Tmax - 1}, the rows of cos and sin, got {low} .. {high}; "
                f"make longer tables"
            )


def _check_in_place(q, k) -> None:
    for name, x in (("q", q), ("k", k)):
        if checks.repeats_an_element(x):
            raise ValueError(
                f"rope: in_place=True writes over {name}, each element of which must have its own place in memory, got "
                f"shape {tuple(x.shape)} with strides {x.stride()}; pass {name}.contiguous()"
            )
    if checks.share_an_element(q, k):
        raise ValueError("rope: in_place=True writes over q and k, which must not overlap in memory; pass k.clone()")


def _forward(q, k, cos, sin, positions, interleaved, inverse, backend):
    return launcher(backend, "rope", "rope")(q, k, cos, sin, positions, interleaved, inverse)


def _fake(q, k, cos, sin, positions, interleaved, inverse, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dq_out, dk_out):
    dq, dk = _rope(dq_out, dk_out, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse, ctx.backend)
    return dq, dk, *[None] * 6


_rope = register(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, str backend)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _forward_in_place(q, k, cos, sin, positions, interleaved, inverse, backend):
    launcher(backend, "rope", "rope")(q, k, cos, sin, positions, interleaved, inverse, True)
    increment_version((q, k))  # whoever saved them for a backward pass gets an error, not a wrong gradient


class _Turned(torch.autograd.Function):
    """Marks one tensor as rotated in place; the launch does both. One each: autograd takes a function that changes a
    view, as of a fused qkv, only if that is all it returns."""

    @staticmethod
    def forward(ctx, x, *shared):
        ctx.mark_dirty(x)
        _setup_context(ctx, (x, x, *shared), x)
        return x

    @staticmethod
    def backward(ctx, dy):
        dx, *nothing = _backward(ctx, dy, dy[:, :, :0])
        return dx, *nothing[1:]


def _differentiable_in_place(keyset, q, k, *shared):
    if torch.is_grad_enabled():
        for x in (q, k):
            if x.requires_grad:
                _Turned.apply(x, *shared)  # before the launch: it raises on leaves, and on views that may not change
    with torch._C._AutoDispatchBelowAutograd():
        _rope_in_place.redispatch(keyset & torch._C._after_autograd_keyset, q, k, *shared)


_rope_in_place = register(
    "rope_",
    "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, "
    "str backend) -> ()",
    forward=_forward_in_place,
    fake=lambda *arguments: None,
    opaque=lambda *arguments: True,
)
LIBRARY.impl("rope_", _differentiable_in_place, "Autograd", with_keyset=True)


def rope(q, k, cos, sin, *, positions=None, interleaved=False, in_place=False, backend=None):
    """Rotate q and k by the angles of their positions.

    q (B, T, H, D), k (B, T, Hkv, D), of one dtype, any strides; cos, sin (Tmax, d) fp32 or fp64 for d rotated pairs,
    2 d <= D; positions: None for 0 .. T - 1, or int32 or int64 of shape (T,) or (B, T). interleaved: a pair is two
    neighbours (GPT-J), not two elements half the rotated part apart (Llama). Returns new (q, k), contiguous.
    in_place: q and k are rotated where they lie and returned themselves; as with PyTorch's own operations in place,
    autograd raises RuntimeError for leaves that need a gradient and for views that may not be changed.
    Raises ValueError or TypeError on other shapes, dtypes, devices, in place on q and k that overlap, and on a CPU for
    positions outside the tables.
    """
    if not in_place:
        q, k = autocast.alike(q, k)
    _check(q, k, cos, sin, positions)
    chosen = resolve(_problem(q, k, cos, sin, interleaved=interleaved, in_place=in_place), backend)
    if in_place:
        if not torch.compiler.is_compiling():  # strides may be symbols
            _check_in_place(q, k)
        _rope_in_place(q, k, cos, sin, positions, interleaved, False, chosen)
        return q, k
    return _rope(q, k, cos, sin, positions, interleaved, False, chosen)
