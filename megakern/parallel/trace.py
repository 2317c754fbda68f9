"""Where this rank is: step, phase and last collectives, in a mapped file that stays readable when the process is gone.

The file of a rank has a fixed size. A write is a store to shared memory, so SIGKILL and SIGSTOP lose nothing, and no
system call is made: 1 to 3 microseconds a collective, 5 to 20 a layer and step, where a layer takes milliseconds.

    header      who: rank, world size, process id and its start time, host
    place x 2   step and phase, written in turn; the reader takes the newer one that is whole
    failure     what ended this rank, as JSON; empty while it is well
    ring        the last `KEPT` collectives: step, number within the step, operation, shape, dtype, group, digest

The digest is a CRC-32 over all collectives since the step began. Ranks that did the same have the same digest.

One recorder a process, like logging: a collective inside a backward pass or a kernel has nobody to hand it one.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

KEPT = 128
"""Collectives that a file remembers."""

_MAGIC = b"MEGATRC1"
_HEADER = struct.Struct("<8sIIIQd64s")  # magic, rank, world, process id, its start in clock ticks, time, host
_PLACE = struct.Struct("<Qqd160sQ")  # count, step, time, phase, count again
_ENTRY = struct.Struct("<QqIId152sQ")  # number, step, number in the step, digest, time, text, number again
_FAILURE = struct.Struct("<I3000s")  # length, JSON
_PLACES = 128
_FAILED = _PLACES + 2 * _PLACE.size
_RING = _FAILED + _FAILURE.size
SIZE = _RING + KEPT * _ENTRY.size


class Recorder:
    """Writes the file at `path` for `rank` of `world`. A file that was there is replaced."""

    def __init__(self, path: Path, rank: int, world: int) -> None:
        path.unlink(missing_ok=True)  # a reader of the old file keeps the old file
        with path.open("w+b") as file:
            file.truncate(SIZE)
            self._map = mmap.mmap(file.fileno(), SIZE)
        self.step, self.number, self.index, self.digest = -1, 0, 0, 0
        self._places = 0
        self._texts: dict[tuple, bytes] = {}
        host = platform.node().encode()
        pid = os.getpid()
        _HEADER.pack_into(self._map, 0, _MAGIC, rank, world, pid, started_ticks(pid) or 0, time.time(), host)

    def begin_step(self, step: int) -> None:
        self.step, self.index = step, 0
        self.digest = zlib.crc32(step.to_bytes(8, "little", signed=True))

    def phase(self, text: str) -> None:
        self._places += 1
        offset = _PLACES + (self._places % 2) * _PLACE.size
        _PLACE.pack_into(self._map, offset, self._places, self.step, time.time(), text.encode(), self._places)

    def collective(self, op: str, tensor: torch.Tensor | None, group: dist.ProcessGroup | None) -> None:
        shape, dtype = (None, None) if tensor is None else (tensor.shape, tensor.dtype)
        key = (op, shape, dtype, None if group is None else group.group_desc)
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = _describe(*key)
        self.number += 1
        self.index += 1
        self.digest = zlib.crc32(text, self.digest)
        offset = _RING + (self.number % KEPT) * _ENTRY.size
        _ENTRY.pack_into(
            self._map, offset, self.number, self.step, self.index, self.digest, time.time(), text, self.number
        )

    def fail(self, kind: str, text: str) -> None:
        """Only the first failure is kept: what follows is its consequence."""
        if _FAILURE.unpack_from(self._map, _FAILED)[0]:
            return
        room = _FAILURE.size - 200
        raw = json.dumps({"kind": kind, "text": text[: room // 6], "time": time.time()}).encode()  # \\uXXXX: 6 bytes
        _FAILURE.pack_into(self._map, _FAILED, len(raw), raw)


def _describe(op: str, shape: torch.Size | None, dtype: torch.dtype | None, group: str | None) -> bytes:
    over = "all ranks" if group in (None, "default_pg") else group.removeprefix("mesh_")
    what = "" if shape is None else f" {list(shape)} {str(dtype).removeprefix('torch.')}"
    return f"{op}{what} over {over}".encode()


def started_ticks(pid: int) -> int | None:
    """When process `pid` of this machine started, in clock ticks since boot: tells it from a later one of that id.

    None when there is no such process, or no /proc.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def process_state(pid: int) -> str | None:
    """The letter of process `pid` in /proc: R runs, S sleeps, D waits for a disk, T stopped, Z ended. None: gone."""
    fields = _stat(pid)
    return fields[0] if fields else None


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


# --- this process's recorder ---

_recorder: Recorder | None = None


def start(path: Path, rank: int, world: int) -> None:
    """From here on this process records in the file at `path`. Raises OSError."""
    global _recorder
    _recorder = Recorder(path, rank, world)


def begin_step(step: int) -> None:
    """Step `step` (from 0) begins: the digest and the count of collectives start anew."""
    if _recorder is not None:
        _recorder.begin_step(step)


def phase(text: str) -> None:
    """What this rank does now, as "backward of micro-batch 2 of 4"."""
    if _recorder is not None:
        _recorder.phase(text)


def collective(op: str, tensor: torch.Tensor | None, group: dist.ProcessGroup | None) -> None:
    """Call it right before each collective. `tensor`: what this rank gives; `group` None: all ranks."""
    if _recorder is not None and not torch.compiler.is_compiling():
        _recorder.collective(op, tensor, group)


def digest() -> int:
    """Of the collectives since the step began, 32 bits; 0 when nothing is recorded."""
    return 0 if _recorder is None else _recorder.digest


def fail(kind: str, text: str) -> bool:
    """What ends this rank. False when nothing is recorded in this process."""
    if _recorder is None:
        return False
    _recorder.fail(kind, text)
    return True


# --- reading ---


@dataclass(frozen=True)
class Collective:
    """`text` names operation, shape, dtype and group; `index` counts from 1 within `step` (-1: before the first)."""

    step: int
    index: int
    digest: int
    time: float
    text: str

    def __str__(self) -> str:
        where = "at start" if self.step < 0 else f"of step {self.step}"
        return f"{self.text}, collective {self.index} {where}"


@dataclass(frozen=True)
class Place:
    """What the file of a rank says. `failure`: {"kind", "text", "time"}; `collectives`: oldest first."""

    rank: int
    world: int
    pid: int
    ticks: int
    host: str
    step: int
    phase: str
    phase_time: float
    failure: dict[str, Any] | None
    collectives: list[Collective]

    @property
    def last(self) -> Collective | None:
        return self.collectives[-1] if self.collectives else None


def read(path: Path) -> Place | None:
    """The record at `path`; None when there is none, or it is not one. The process may be running, stopped or gone."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) != SIZE or raw[:8] != _MAGIC:
        return None
    _, rank, world, pid, ticks, _, host = _HEADER.unpack_from(raw, 0)
    places = [_PLACE.unpack_from(raw, _PLACES + i * _PLACE.size) for i in range(2)]
    whole = [p for p in places if p[0] and p[0] == p[-1]]
    _, step, when, phase_text, _ = max(whole, default=(0, -1, 0.0, b"", 0))
    entries = [_ENTRY.unpack_from(raw, _RING + i * _ENTRY.size) for i in range(KEPT)]
    entries = sorted(e for e in entries if e[0] and e[0] == e[-1])  # one that is half written is left out
    return Place(
        rank=rank,
        world=world,
        pid=pid,
        ticks=ticks,
        host=_text(host),
        step=step,
        phase=_text(phase_text),
        phase_time=when,
        failure=_failure(raw),
        collectives=[Collective(s, index, crc, t, _text(text)) for _, s, index, crc, t, text, _ in entries],
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def _failure(raw: bytes) -> dict[str, Any] | None:
    length, data = _FAILURE.unpack_from(raw, _FAILED)
    try:
        return json.loads(data[:length]) if length else None
    except ValueError:  # ended while it was written
        return {"kind": "error", "text": "an error that could not be recorded", "time": 0.0}
