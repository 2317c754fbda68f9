"""Where every Triton kernel is launched: the one place to trace or record them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import library
from torch._subclasses.functional_tensor import FunctionalTensor

from megakern.kernels.triton import tile_config
from megakern.kernels.triton.tile_config import Config

_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its arguments in order, its compile-time constants and its configuration."""

    kernel: object
    arguments: tuple
    constants: dict[str, object]
    config: Config


def launch(kernel, grid: tuple[int, ...], *arguments, config: Config, **constants) -> None:
    """Run `kernel` on `grid` programs with the tiles, warps and stages of `config`; nothing when the grid is empty.

    Under torch.compile the launch goes into the graph through `wrap_triton`, so that inductor sees the kernel.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, {**config.tiles, **constants}, config))
        return
    anchor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    if isinstance(anchor, FunctionalTensor):
        library.wrap_triton(kernel)[grid](*arguments, **config.keywords, **constants)
    elif anchor.is_cuda and anchor.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(anchor):
            kernel.run(*arguments, grid=grid, warmup=False, **config.keywords, **constants)
    else:  # as kernel[grid](...), which takes 1 us more
        kernel.run(*arguments, grid=grid, warmup=False, **config.keywords, **constants)


@contextlib.contextmanager
def recording(generation: int = 9) -> Iterator[list[Launch]]:
    """Within the block nothing runs; the launches are collected instead, as on a GPU of this generation, each with
    every configuration that it may choose. Launchers then take meta tensors.
    """
    global _recorded
    assert _recorded is None, "recordings do not nest"
    _recorded = launches = []
    tile_config.recorded_generation = generation
    try:
        yield launches
    finally:
        _recorded = tile_config.recorded_generation = None
