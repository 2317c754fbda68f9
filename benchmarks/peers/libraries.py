"""Other people's kernels, each optional: the call where the library is installed, or the reason why it is not here.

Nothing of them is installed with megakern. What was called is the library's own public function.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

# Name: module, what pip calls it, does it need an NVIDIA GPU.
LIBRARIES = {
    "Liger": ("liger_kernel", "liger-kernel", True),
    "quack": ("quack", "quack-kernels", True),
    "flash-attn": ("flash_attn", "flash-attn", True),
    "transformers": ("transformers", "transformers", False),
    "Megatron-Core": ("megatron.core", "megatron-core", True),
}


def why_not(name: str, device_type: str) -> str | None:
    """Why a library cannot be a peer on this kind of device, or None."""
    module, package, gpu_only = LIBRARIES[name]
    if gpu_only and device_type != "cuda":
        return "runs on NVIDIA GPUs only"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        found = False
    return None if found else f"not installed: pip install {package}"


def peer(options: Any, name: str, path: str, call: Callable[..., Any]) -> dict[str, Callable[..., Any] | str]:
    """{name: inputs -> call(module at `path`, *inputs)}, or {name: why it is not here}, for a `Case`."""
    reason = why_not(name, options.device.type)
    if reason is not None:
        return {name: reason}
    try:
        module = importlib.import_module(path)
    except Exception as error:  # noqa: BLE001 - an installed library that this torch or GPU breaks in its own way
        return {name: f"{path} does not load: {type(error).__name__}: {str(error)[:120]}"}
    return {name: lambda *inputs: call(module, *inputs)}
