"""What `torch.autocast` asks of an op, after PyTorch's lists of its own functions; the same on every device.

    linear, linear_swiglu, attention, paged_attention, linear_cross_entropy    products in autocast's dtype
    layer_norm, rms_norm                    fp32, with an fp32 result, as PyTorch's list for GPUs has layer_norm
    cross_entropy                           no cast: whatever comes in, it is computed and returned in fp32
    gelu, swiglu, rope, dropout             the dtype of what comes in, of several the widest

As PyTorch does, float64 is left alone, and where a residual has another dtype the sum has the wider one. Unlike
PyTorch, weights in fp32 are not cast beforehand: the ops read them as they are, so no narrow copy of each weight lives
until the end of the autocast block, and their gradients are sums in fp32, never rounded to the narrow dtype.

Public functions cast, so that what is wrong is still refused by name. Inside the ops autocast is off (`dispatch`):
what a backend computes in fp32 from bf16 operands stays fp32.
"""

from __future__ import annotations

import torch

from megakern.kernels.constant import constant_result

NARROW = (torch.float16, torch.bfloat16)
PRODUCTS = frozenset({"linear", "linear_swiglu", "attention", "paged_attention", "linear_cross_entropy"})
NORMS = frozenset({"layer_norm", "rms_norm"})


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of products with x under autocast; None where it is off for x's device, or x is not to be cast."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, torch.Tensor):
        return None
    return _dtype_on(x.device.type) if x.dtype in (*NARROW, torch.float32) else None


def _dtype_on(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if _available(device) and torch.is_autocast_enabled(device) else None


@constant_result  # the compiler of torch 2.11 cannot trace it
def _available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def narrow(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In autocast's dtype, unless they are not to be cast."""
    castable = (*NARROW, torch.float32)
    return [x.to(dtype) if x is not None and x.dtype in castable else x for x in tensors]


def readable(dtype: torch.dtype, *weights: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In autocast's dtype or in fp32: what an op reads beside an x in autocast's dtype."""
    return [w.to(dtype) if w is not None and w.dtype in NARROW else w for w in weights]


def to_widen(x: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Does autocast want an op of x in fp32, and is one of these narrower?"""
    return autocast_dtype(x) is not None and any(t is not None and t.dtype in NARROW for t in (x, *tensors))


def widened(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In fp32, unless they are wider."""
    return [x.float() if x is not None and x.dtype in NARROW else x for x in tensors]


def alike(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both in the wider of their dtypes under autocast; elsewhere as they are."""
    if y is None or x.dtype == y.dtype or autocast_dtype(x) is None or autocast_dtype(y) is None:
        return x, y
    wide = torch.promote_types(x.dtype, y.dtype)
    return x.to(wide), y.to(wide)


def computed_in(op: str, device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `op` is computed in when it is given `dtype`."""
    low = _dtype_on(device) if dtype in (*NARROW, torch.float32) else None
    if low is None or op not in PRODUCTS | NORMS:
        return dtype
    return low if op in PRODUCTS else torch.float32
