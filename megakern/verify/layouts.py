"""Layouts as `megakern verify` writes them, "tp=2,dp=2,sp", and those that a machine and a model have room for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from megakern.config import ConfigError, GPTConfig, require
from megakern.parallel.data import ZERO
from megakern.train import machine
from megakern.train.config import RunConfig

CPU_PROCESSES = 4
"""Most processes of a layout on a machine without GPUs: more of them only wait for the same cores."""


@dataclass(frozen=True, order=True)
class Layout:
    """How one run is split over processes. zero None: that of the settings."""

    dp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    zero: int | None = None

    @property
    def processes(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in (("tp", self.tp), ("dp", self.dp)) if value > 1]
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"zero={self.zero}"] if self.zero is not None else []
        return ",".join(parts) or "tp=1"

    def of(self, config: RunConfig, precision: str) -> RunConfig:
        """The settings `config` under this layout and precision. Replicas are as many of theirs as dp has room for."""
        parallel = dataclasses.replace(
            config.parallel,
            tp=self.tp,
            dp=self.dp,
            replicas=math.gcd(config.parallel.replicas, self.dp),
            zero=self.zero or config.parallel.zero,
            sequence_parallel=self.sequence_parallel,
        )
        train = dataclasses.replace(config.train, precision=precision)
        return dataclasses.replace(config, parallel=parallel, train=train)


ALONE = Layout()
_SIZES = ("tp", "dp", "zero")


def parse_layout(text: str) -> Layout:
    """ "tp=2,dp=2,sp" -> Layout. Raises ConfigError: an unknown part, a size below 1, a part given twice."""
    found: dict[str, int | bool] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        key = "sequence_parallel" if part == "sp" else name
        known = part == "sp" or (name in _SIZES and value.isascii() and value.isdigit() and int(value) >= 1)
        require(
            known, f"--layouts: {part!r} of {text!r} is none of tp=N, dp=N, zero=N, sp; write layouts like tp=2,dp=2,sp"
        )
        require(key not in found, f"--layouts: {text!r} has {name} twice")
        found[key] = True if part == "sp" else int(value)
    layout = Layout(**found)
    require(not layout.sequence_parallel or layout.tp > 1, f"--layouts: {text!r}: sp needs tp=2 or more")
    require(layout.zero in (None, *ZERO), f"--layouts: {text!r}: zero must be 1, 2 or 3")
    require(layout.zero is None or layout.dp > 1, f"--layouts: {text!r}: zero needs dp=2 or more")
    return layout


def room() -> int:
    """Processes that this machine can start: one a GPU, else `CPU_PROCESSES`."""
    return torch.cuda.device_count() if torch.cuda.is_available() else CPU_PROCESSES


def no_room(layout: Layout) -> str | None:
    """Why this machine cannot run `layout`, or None."""
    if layout.processes <= room():
        return None
    if torch.cuda.is_available():
        return f"it needs {layout.processes} GPUs, one a process, and there are {room()}"
    return f"it needs {layout.processes} processes; without GPUs {room()} is the limit"


def default_layouts(model: GPTConfig) -> list[Layout]:
    """Every layout into which `model` can be split, with processes for 2 or for the GPUs or cores here, 4 at most."""
    units = torch.cuda.device_count() if torch.cuda.is_available() else machine.cores()
    most = max(2, min(4, units))
    sizes = (1, 2, 4)
    layouts = [Layout(tp=tp, dp=dp, sequence_parallel=sp) for dp in sizes for tp in sizes for sp in (False, True)]
    layouts = [each for each in layouts if 1 < each.processes <= most and (each.tp > 1 or not each.sequence_parallel)]
    return [each for each in layouts if _refusal(each, model) is None]


def _refusal(layout: Layout, model: GPTConfig) -> str | None:
    try:
        check_layout(layout, model)
    except ConfigError as error:
        return str(error)
    return None


def check_layout(layout: Layout, model: GPTConfig) -> None:
    """Raises ConfigError when `model` cannot be split into `layout`."""
    try:
        model.check_tensor_parallel(layout.tp)
    except ConfigError as error:
        raise ConfigError(f"layout {layout}: {error}") from error
    require(
        not layout.sequence_parallel or model.sequence_length % layout.tp == 0,
        f"layout {layout}: model.sequence_length = {model.sequence_length} is not divisible by tp = {layout.tp}, which "
        f"sp needs; change one of them",
    )
