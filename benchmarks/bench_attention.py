"""Attention beside PyTorch's implementations, FlexAttention and flash-attn. FLOPs: 4 B H T^2 D, half if causal, of a
window the keys that queries see; backward 2.5 times.

    python -m benchmarks.gpu --only bench --ops attention,paged_attention     all of it on a GPU; --tiny: on a CPU too

On a GPU "torch sdpa" is PyTorch's FlashAttention 2, "cuDNN" and "efficient" its other implementations of that function.
FlexAttention is compiled, with a block mask made beforehand: on a GPU only, as on CPUs it has no backward pass. Of a
window PyTorch's function gets a mask of T^2 bytes, which only "efficient" takes. A row says who is not timed and why.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

# BxTxHxHkvxD, causal. After a colon: "full"; "window=N", a query sees N keys before its own; "deterministic", gradients
# of the same bits at each run (peers as they are by default), of which only the backward pass is timed.
SHAPES = {
    "cpu": ["12x256x6x6x64", "4x512x12x12x64", "1x1024x16x4x128"],
    "cuda": [
        "2x8192x64x8x128",
        "2x8192x64x8x128:full",
        "1x16384x64x8x128",
        "1x16384x32x32x64",
        "4x2048x32x8x128",
        "1x16384x32x32x64:full",
        "2x8192x64x8x128:deterministic",
        "2x8192x64x8x128:full,deterministic",
        "1x16384x32x32x64:window=128",
    ],
    "tiny": [
        "1x3x2x1x8",
        "1x3x2x1x8:full",
        "1x3x2x1x8:deterministic",
        "1x3x2x1x8:full,deterministic",
        "1x9x2x1x8:window=2",
    ],
}


@dataclass(frozen=True)
class Kind:
    """What stands behind the colon of a shape."""

    causal: bool = True
    window: int | None = None
    deterministic: bool = False

    @classmethod
    def of(cls, text: str) -> Kind:
        words = set(text.split(",")) - {""}
        window = next((word for word in words if re.fullmatch(r"window=\d+", word)), None)
        full, deterministic = "full" in words, "deterministic" in words
        if words - {"full", "deterministic", window} or (full and window):
            raise ValueError(f"bench: a kind of attention is of full or window=N, and deterministic; got {text!r}")
        return cls(not full, int(window.partition("=")[2]) if window else None, deterministic)

    def visible(self, T: int) -> float:
        """Pairs of a query and a key that it sees; causal counts as half."""
        if self.window is not None:
            whole = min(self.window + 1, T)
            return whole * (whole + 1) / 2 + (T - whole) * whole
        return T * T / (2 if self.causal else 1)

    def mask(self, T: int, device) -> torch.Tensor:
        """Of a window, as PyTorch's function takes it."""
        return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(-self.window)


def sdpa(q, k, v, causal: bool, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def by(implementation: SDPBackend, causal: bool, mask=None):
    def call(q, k, v):
        with sdpa_kernel(implementation):
            return sdpa(q, k, v, causal, mask)

    return call


def efficient(q, k, v, causal: bool, mask=None):
    """The memory-efficient implementation has no grouped heads: keys and values are repeated, inside the time."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    return by(SDPBackend.EFFICIENT_ATTENTION, causal, mask)(q, k, v)


def flex(T: int, kind: Kind, device):
    def sees(b, h, i, j):
        return i >= j if kind.window is None else (i >= j) & (i - j <= kind.window)

    mask = create_block_mask(sees, None, None, T, T, device=device) if kind.causal else None
    compiled = torch.compile(functools.partial(flex_attention, block_mask=mask), dynamic=False)

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def peers_of(options, T: int, kind: Kind) -> dict:
    windowed = kind.window is not None
    mask = kind.mask(T, options.device) if windowed else None
    found = dict.fromkeys(("torch sdpa", "cuDNN", "efficient"), "runs on NVIDIA GPUs only")
    found["FlexAttention"] = "has no backward pass on CPUs"
    if options.device.type != "cuda":
        return found | {"torch sdpa": functools.partial(sdpa, causal=kind.causal, mask=mask)}
    found["efficient"] = functools.partial(efficient, causal=kind.causal, mask=mask)
    for name, implementation in (("torch sdpa", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        found[name] = "takes no mask, as which a window comes" if windowed else by(implementation, kind.causal)
    found["FlexAttention"] = "is slow uncompiled; --compile times it"
    if options.compile:
        torch._functorch.config.donated_buffer = False  # else a backward pass runs only once
        found["FlexAttention"] = flex(T, kind, options.device)
    return found


def cases(options):
    for shape in options.shape:
        dims, _, text = shape.partition(":")
        kind = Kind.of(text)
        B, T, H, kv_heads, D = sizes(dims)
        inputs = draw(options, B, T, H, D), draw(options, B, T, kv_heads, D), draw(options, B, T, kv_heads, D)
        work = 4.0 * B * H * D * kind.visible(T)
        window = None if kind.window is None else (kind.window, None)
        how = {"causal": kind.causal, "window": window, "deterministic": kind.deterministic}
        call = lambda q, k, v, backend, how=how: mk.attention(q, k, v, **how, backend=backend)  # noqa: E731
        sides = (-1, -1) if kind.window is None else (kind.window, 0)
        call_flash = lambda m, q, k, v, kind=kind, sides=sides: m.flash_attn_func(  # noqa: E731
            q, k, v, causal=kind.causal, window_size=sides, deterministic=kind.deterministic
        )
        peers = peers_of(options, T, kind) | peer(options, "flash-attn", "flash_attn", call_flash)
        forward = None if kind.deterministic else work
        yield Case(shape, {**ours(options, "attention", call), **peers}, inputs, forward, "FLOP", 2.5 * work)


def benchmark(options):
    run("attention, causal, BxTxHxHkvxD", options, cases(options))


if __name__ == "__main__":
    main("attention", benchmark, SHAPES)
