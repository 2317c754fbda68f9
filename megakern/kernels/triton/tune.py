"""Choosing among the named configurations of `configs.py` by measurement, where the user asks for it.

Off unless `autotune(True)` was called: the table's choice depends on sizes and dtype alone, so that results repeat on
every machine and ranks of one model agree to the bit. When on, the first call of a class of problems on a GPU times
every configuration that the table names for it and keeps the fastest, in
`$XDG_CACHE_HOME/megakern/` (default `~/.cache`), a file for each GPU and version of Triton. Nothing is timed at import,
while a model is compiled or while a CUDA graph is captured: there what is known is used, else the table.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from megakern.kernels.triton.tile_config import Choice, Config

log = logging.getLogger("megakern")

_enabled = False
_known: dict[Path, dict[str, dict[str, float]]] = {}  # file -> problem class -> configuration's name -> microseconds


def autotune(enabled: bool) -> None:
    """Switch the tuning of Triton kernels on or off, for this process. With several ranks, rounding may then differ
    between them: leave it off where replicated values must stay equal to the bit.
    """
    global _enabled
    _enabled = enabled


def run(choice: Choice, anchor: torch.Tensor, call: Callable[[Config], None], *, repeats: bool = True) -> None:
    """`call(config)` with the table's configuration, or where tuning is on with the fastest of the choice.

    repeats: a second call gives the same result, so that all may be timed. `anchor` is one of the tensors.
    """
    options = choice.options
    if anchor.is_meta:  # of `launch.recording`: everything that may ever run
        for config in options:
            call(config)
        return
    times = None
    if _enabled and len(options) > 1:
        times = _times(choice)
        if times is None and repeats and _may_measure(anchor):
            times = _measure_all(choice, call)
    call(options[0] if times is None else _fastest(times, options))


def told(choice: Choice) -> tuple[Config, str]:
    """For `mk.explain`: the configuration that `run` would take without measuring, and where it comes from."""
    options = choice.options
    if not _enabled or len(options) == 1:
        return options[0], ""
    times = _times(choice)
    if times is None:
        return options[0], f"the table's, not yet tuned; {options[0].why}"
    best = _fastest(times, options)
    gain = times.get(options[0].name, float("nan")) / times[best.name]
    return best, f"tuned: {times[best.name]:.1f} us, {gain:.2f} x as fast as the table's {options[0].name!r}"


def _fastest(times: dict[str, float], options: tuple[Config, ...]) -> Config:
    able = [config for config in options if config.name in times]
    return min(able, key=lambda config: times[config.name])


def _times(choice: Choice) -> dict[str, float] | None:
    """What is known of these options; None where one of them is new."""
    times = _read(cache_file()).get(choice.key, {})
    able = any(type(times.get(config.name)) is float for config in choice.options)
    return times if able and times.get("of") == _named(choice.options) else None


def _named(options: tuple[Config, ...]) -> str:
    """Names and sizes: a configuration that has changed since is measured again."""
    return "; ".join(f"{c.name} {c.tiles} {c.warps} {c.stages}" for c in options)


def _measure_all(choice: Choice, call: Callable[[Config], None]) -> dict[str, float] | None:
    problem, times = choice.key, {"of": _named(choice.options)}
    for config in choice.options:
        try:
            times[config.name] = _measure(lambda config=config: call(config)) * 1e6
        except Exception as error:  # noqa: BLE001 - Triton has no common error for what a GPU cannot run
            log.warning("%s: configuration %r cannot run here: %s", problem, config.name, error)
    if len(times) == 1:
        return None
    log.info("%s: %s", problem, ", ".join(f"{name} {t:.1f} us" for name, t in times.items() if name != "of"))
    _write(cache_file(), problem, times)
    return times


# --- what tests replace ---


def _identity() -> tuple[str, str]:
    """GPU and version of Triton."""
    import triton

    return torch.cuda.get_device_name(), triton.__version__


def _may_measure(anchor: torch.Tensor) -> bool:
    return type(anchor) is torch.Tensor and anchor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _measure(call: Callable[[], object]) -> float:
    """Median seconds of a call, from a cold cache."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3


# --- the file ---


def cache_file() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu, version = _identity()
    return home / "megakern" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu)}-triton-{version}.json"


def _read(path: Path) -> dict[str, dict]:
    if path in _known:
        return _known[path]
    found = {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(times, dict) for times in found.values()):
            raise ValueError("not a table of times")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is not used: %s", path, error)
        found = {}
    _known[path] = found
    return found


def _write(path: Path, problem: str, times: dict) -> None:
    """Adds to the file what was measured; another process may have added to it in the meantime."""
    _known.pop(path, None)
    table = {**_read(path), problem: times}
    _known[path] = table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(table, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the tuned configurations are kept in memory alone: %s", error)
