"""Who computes what several modules say in one go asks here first: modules with hooks are called, so that hooks run.

torch's hooks of all modules at once do not count: tools that watch how a model runs (CommDebugMode, FlopCounterMode)
set them, and must not change what they watch.
"""

from __future__ import annotations

from torch import nn


def watched(*modules: nn.Module | None) -> bool:
    """Has one of them a forward or backward hook?"""
    return any(
        module is not None
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )
