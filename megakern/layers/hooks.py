"""Who computes what several modules say in one go asks here first: modules with hooks are called, so that hooks run."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def watched(*modules: nn.Module | None) -> bool:
    """Has one of them, or torch for all modules, a forward or backward hook?"""
    return _has_any_global_hook() or any(
        module is not None
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )
