"""Input checks shared by the ops. Messages: op, what was wanted, what came, the way out."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors are fp16, bf16, fp32 or fp64, and of one dtype and device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(present.items()))
    if first.dtype not in FLOATS:  # also of numpy arrays, whose dtypes are others
        kind = type(first)
        foreign = f"a {kind.__module__}.{kind.__name__}; make a tensor of it"
        found = first.dtype if isinstance(first, torch.Tensor) else foreign
        raise TypeError(f"{op}: {first_name} must be float16, bfloat16, float32 or float64, got {found}")
    for name, tensor in present.items():
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}; "
                f"cast one of them with .to()"
            )
        same_device(op, first_name, first, name, tensor)


def same_or_fp32(op: str, first_name: str, first: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """All given tensors have `first`'s dtype or fp32, and are on its device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in (first.dtype, torch.float32):
            raise TypeError(
                f"{op}: {name} must be float32 or have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}; "
                f"cast it with .to()"
            )
        same_device(op, first_name, first, name, tensor)


def same_device(op: str, first_name: str, first: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {first_name}, {first.device}, got {tensor.device}; "
            f"move it with .to()"
        )


def shape(op: str, name: str, tensor: torch.Tensor, wanted: tuple[int, ...], meaning: str, hint: str = "") -> None:
    """`tensor` has the shape `wanted`; `meaning` is that shape in letters, as "(N, K)"."""
    found = None if tensor is None else tuple(tensor.shape)
    if found != tuple(wanted):
        raise ValueError(
            f"{op}: {name} must have shape {meaning} = {tuple(wanted)}, got {found}" + (f"; {hint}" if hint else "")
        )


def repeats_an_element(x: torch.Tensor) -> bool:
    """Do two indices of x lead to the same place in memory?"""
    if x.is_contiguous() or x.numel() == 0:
        return False
    steps = [(stride, size - 1) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    strides = {stride for stride, _ in steps}
    if 0 in strides or len(strides) < len(steps):
        return True
    steps.sort(reverse=True)  # two places are one if, from some dimension on, steps lead back to where they began
    return any(
        _meet(0, [(stride, 1, most), *((step, -bound, bound) for step, bound in steps[i + 1 :])])
        for i, (stride, most) in enumerate(steps)
    )


def share_an_element(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Do an index of x and one of y, of one dtype, lead to the same place in memory? Columns that take turns do not."""
    if not torch._C._is_alias_of(x, y) or x.numel() == 0 or y.numel() == 0:
        return False
    steps = [(stride, 0, size - 1) for size, stride in zip(x.shape, x.stride(), strict=True)]
    steps += [(stride, 1 - size, 0) for size, stride in zip(y.shape, y.stride(), strict=True)]
    return _meet(x.storage_offset() - y.storage_offset(), _by_stride(steps))


def _by_stride(steps) -> list[tuple[int, int, int]]:
    """(stride, least, most) of the number of steps along each dimension -> one for each stride, the longest first."""
    joined: dict[int, tuple[int, int]] = {}
    for stride, low, high in steps:
        if low != high:
            before = joined.get(stride, (0, 0))
            joined[stride] = before[0] + low, before[1] + high
    return [(stride, *joined[stride]) for stride in sorted(joined, reverse=True)]


def _meet(gap: int, terms: list[tuple[int, int, int]]) -> bool:
    """Is gap + the sum of all stride n zero for some n, each within its bounds? Exact. A step longer than all shorter
    ones together, as in most tensors, leaves one or two n to try."""
    if not terms:
        return gap == 0
    (stride, low, high), *rest = terms
    if stride == 0:
        return gap == 0
    least = gap + sum(step * bound for step, bound, _ in rest)
    most = gap + sum(step * bound for step, _, bound in rest)
    tries = range(max(low, -(most // stride)), min(high, -least // stride) + 1)
    return any(_meet(gap + stride * n, rest) for n in tries)
