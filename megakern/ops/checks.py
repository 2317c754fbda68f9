"""Input checks shared by the ops. Messages: op, what was wanted, what came, the way out."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors are fp16, bf16, fp32 or fp64, and of one dtype and device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(present.items()))
    if first.dtype not in FLOATS:
        raise TypeError(f"{op}: {first_name} must be float16, bfloat16, float32 or float64, got {first.dtype}")
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
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(
            f"{op}: {name} must have shape {meaning} = {tuple(wanted)}, got {tuple(tensor.shape)}"
            + (f"; {hint}" if hint else "")
        )
