"""rope (rotate-half) beside a plain PyTorch one. Bytes: read and write q and k; backward the same."""

from __future__ import annotations

import torch

import megakern as mk
from benchmarks.common import Case, draw, main, ours, run, sizes
from benchmarks.peers.libraries import peer

SHAPES = {
    "cpu": ["12x256x6x64", "2x1024x32x128"],
    "cuda": ["1x8192x32x128", "8x4096x32x128"],
    "tiny": ["1x3x2x4"],
}


def plain(q, k, cos, sin):
    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        c, s = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    return rotate(q), rotate(k)


LIGER = ("Liger", "liger_kernel.transformers.functional")


FLASH = ("flash-attn", "flash_attn.layers.rotary")


def flash(module, *heads_and_tables):
    """Its tables have the dtype of q; q and k are a launch each."""
    *heads, cos, sin = heads_and_tables
    return tuple(module.apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype)) for x in heads)


def liger(module, q, k, cos, sin):
    """Liger takes (B, H, T, D) and tables over all of D; it rotates in place, so it gets a copy."""
    tables = (torch.cat([x, x], dim=-1)[None].to(q.dtype) for x in (cos, sin))
    out = module.liger_rope(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), *tables)
    return tuple(x.transpose(1, 2) for x in out)


def cases(options):
    for shape in options.shape:
        B, T, H, D = sizes(shape)
        q, k = draw(options, B, T, H, D), draw(options, B, T, max(1, H // 4), D)
        angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, D, 2) / D)).to(options.device)
        cos, sin = angle.cos(), angle.sin()
        moved = 2 * (q.numel() + k.numel()) * q.element_size()
        call = lambda q, k, backend, cos=cos, sin=sin: mk.rope(q, k, cos, sin, backend=backend)  # noqa: E731
        contestants = {
            **ours(options, "rope", call),
            "torch": lambda q, k, cos=cos, sin=sin: plain(q, k, cos, sin),
            **peer(options, *FLASH, lambda m, q, k, cos=cos, sin=sin: flash(m, q, k, cos, sin)),
            **peer(options, *LIGER, lambda m, q, k, cos=cos, sin=sin: liger(m, q, k, cos, sin)),
        }
        yield Case(shape, contestants, (q, k), moved, "B", moved)


def benchmark(options):
    run("rope", options, cases(options))


if __name__ == "__main__":
    main("rope", benchmark, SHAPES)
