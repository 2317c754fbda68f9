"""What a block computes again in backward instead of keeping it (arXiv 2205.05198, section 5).

    attention   the attention core: from the output of the qkv projection to the input of the output projection
    mlp         the feed-forward half, from its normed input to its output
    norm        the outputs of the norms, from the residual stream

Dropout masks are functions of keys and not of a generator's state, so the second run gives the same bits. The attention
op never keeps the T x T scores, so of the core only what lies between qkv and o is won: q and k after norm and rope
and the log-sum-exp. megakern/model/memory.py counts what each choice keeps. Under `torch.autocast` "norm" wins nothing:
products keep narrow copies of their own of what the norms give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megakern.config import RECOMPUTE, RECOMPUTE_MODULES


def chosen_modules(recompute: str, modules: tuple[str, ...]) -> frozenset[str]:
    """What blocks recompute inside for a mode: `modules` for "selective", else nothing. Raises ValueError by name."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    unknown = [name for name in modules if name not in RECOMPUTE_MODULES]
    if unknown or not modules:
        raise ValueError(
            f"recompute_modules must be some of {', '.join(RECOMPUTE_MODULES)}, got {', '.join(modules) or 'none'}"
        )
    return frozenset(modules if recompute == "selective" else ())


def run_again(function: Callable, *inputs: Any, **options: Any) -> Any:
    """function(*inputs, **options), of which only `inputs` are kept: backward calls it again. Where no gradients are
    recorded, a plain call."""
    if not torch.is_grad_enabled():
        return function(*inputs, **options)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


class made_again(saved_tensors_hooks):
    """Within the block, autograd does not keep `output` = function(source): backward calls function(source) again.

    For an output that is cheap to make and read by several ops. Other tensors are kept as ever.
    """

    def __init__(self, output: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor):
        # The storage, not its address: fake tensors, as those of `megakern plan`, have none.
        where, shape, source = output.untyped_storage()._cdata, output.shape, source.detach()

        def pack(tensor: torch.Tensor) -> torch.Tensor | None:
            same = tensor.untyped_storage()._cdata == where and tensor.shape == shape
            return None if same else tensor

        @torch.no_grad()
        def unpack(kept: torch.Tensor | None) -> torch.Tensor:
            return function(source) if kept is None else kept

        super().__init__(pack, unpack)
