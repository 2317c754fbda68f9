"""Collectives through shared memory, when all ranks of a gloo group are on one machine.

gloo moves every byte through sockets of the kernel. Here a rank copies its part into memory that all ranks of the group
have mapped, and each makes its own result from there (csrc/cpu/shared.h has the protocol).

    all-reduce        the sum in the order of ranks, the same bits on all; bf16 is added up in fp32 and rounded once.
                      Two ranks have gloo's bits; with more, gloo adds in another order, and rounds bf16 at each step.
    reduce-scatter    the same sums
    all-gather        as gloo's

A channel belongs to a process group and is opened at its first collective of ours, by agreement of its ranks over gloo.
It is not a backend of torch.distributed: those are C++ classes of torch's own ABI, which would tie the compiled module
to one version of torch, or Python classes that must stand in for a whole process group, whose hooks differ between
torch 2.11 and 2.13. So the group stays a gloo group, for FSDP2, DTensor, checkpoints and the user's own collectives,
and only megakern/parallel/collectives.py looks for a channel. A failure is what a failure of gloo is: dist.DistError,
after the group's own timeout, or at once when a rank has died.

The memory has no name (memfd_create): nothing is left in /dev/shm however a process ends, and the size of /dev/shm,
64 MB in a container of Docker's, is no limit.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
import weakref
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch  # first, so that the extension shares its OpenMP library
import torch.distributed as dist
from torch.autograd import _profiler_enabled

from megakern.parallel import trace

try:
    from megakern import _cpu
except ImportError:
    _cpu = None

SLOTS, CHUNK = 8, 128 * 1024
"""Chunks of a rank's ring, and bytes of one. 1 MB stays in near caches: on a Xeon with AMX faster than 2 or 4."""
SPINS = 2000  # looks, of about 20 ns, before a rank that waits sleeps
NOW = 1 << 30  # as many chunks as there is room for
SLICE = 100  # milliseconds after which Python may handle a signal

SUM, MAX = 0, 1
_ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER = 0, 1, 2
_NAMES = ("all_reduce", "all_gather", "reduce_scatter")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int64: 3, torch.uint8: 4}
REDUCED = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
_DONE, _NOT_YET, _GONE = 0, 1, 2

WHY = (
    "",
    "MEGAKERN_SHARED_MEMORY=0 asks for gloo",
    "megakern._cpu was not built, or by an older megakern; install g++ and megakern again",
    "shared memory is used on Linux alone",
    "there is no room for the memory that ranks would share",
    "the memory of another rank cannot be opened: they run as different users, or in a sandbox",
)
"""Why a rank cannot take part, by the code that ranks tell each other."""
_WELL, _OFF, _NOT_BUILT, _NOT_LINUX, _NO_ROOM, _NOT_OPENED = range(len(WHY))


def why_not() -> str | None:
    """Why processes of this machine cannot share memory, or None. Raises ValueError for a wrong setting."""
    code = _unable()
    if code == _WELL:
        file = _new_file(2, 0)
        if file < 0:
            return WHY[_NO_ROOM]
        os.close(file)
    return WHY[code] or None


def _unable() -> int:
    setting = os.environ.get("MEGAKERN_SHARED_MEMORY", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"MEGAKERN_SHARED_MEMORY must be 0 (use gloo) or 1, got {setting!r}")
    if setting == "0":
        return _OFF
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return _NOT_LINUX
    return _WELL if hasattr(_cpu, "SharedChannel") else _NOT_BUILT


class Channel:
    """The shared memory of a group, as `rank` of its `ranks` has it.

    `start_...` return the number that `finish` takes. Tensors are contiguous, on the CPU, and stay as they are until
    then. Parts of a whole alternate in blocks of `block` elements: part p of (B, R, block) is [:, p].
    """

    def __init__(self, native, group: dist.ProcessGroup) -> None:
        self._native, self._group = native, weakref.ref(group)
        self._name = group.group_desc.removeprefix("mesh_")
        self._broken = ""

    def start_all_reduce(self, x: torch.Tensor, out: torch.Tensor, *, reduction: int = SUM, ahead: int = NOW) -> int:
        """x -> out, of its shape, which may be x."""
        return self._start(_ALL_REDUCE, reduction, x, out, x.numel(), x.numel(), ahead)

    def start_all_gather(self, x: torch.Tensor, out: torch.Tensor, block: int, *, ahead: int = NOW) -> int:
        """x of any dtype, a part -> out, the whole."""
        size = x.element_size()
        return self._start(_ALL_GATHER, SUM, x, out, x.numel() * size, block * size, ahead)

    def start_reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, block: int, *, ahead: int = NOW) -> int:
        """x, a whole -> out, a part of the sum."""
        return self._start(_REDUCE_SCATTER, SUM, x, out, out.numel(), block, ahead)

    def _start(self, collective, reduction, x, out, elements, block, ahead) -> int:
        if self._broken:
            raise dist.DistBackendError(self._broken)
        if not (x.is_contiguous() and out.is_contiguous()):
            raise ValueError("shared memory: tensors must be contiguous; call contiguous() before")
        dtype = _DTYPES[torch.uint8 if collective == _ALL_GATHER else x.dtype]
        with _in_profile(_NAMES[collective]):
            return self._native.start(
                collective, reduction, dtype, x.data_ptr(), out.data_ptr(), elements, max(1, block), ahead
            )

    def finish(self, number: int) -> None:
        """Raises dist.DistBackendError: a rank has ended, does something else, or is later than the group's timeout."""
        began = time.monotonic()
        while True:
            with _in_profile("wait"):
                outcome, rank, *other = self._native.finish(number, SLICE)
            if outcome == _DONE:
                return
            if outcome == _NOT_YET:
                waited, timeout = time.monotonic() - began, self._timeout()
                if waited < timeout:
                    continue
                said = f"rank {rank} of {self._name} did not come to this collective within {timeout:g} s"
            elif outcome == _GONE:
                said = f"rank {rank} of {self._name} has ended"
            else:
                collective, _, dtype, elements = other
                kind = next(str(name) for name, code in _DTYPES.items() if code == dtype).removeprefix("torch.")
                said = f"rank {rank} of {self._name} makes another collective here: {_NAMES[collective]} of "
                said += f"{elements} " + ("bytes" if collective == _ALL_GATHER else f"elements of {kind}")
            self._broken = f"shared memory: {said}"
            raise dist.DistBackendError(self._broken)

    def _timeout(self) -> float:
        group = self._group()
        return 0.0 if group is None else _gloo(group).options._timeout.total_seconds()


def _in_profile(name: str) -> AbstractContextManager:
    """An event of torch.profiler while one records; else nothing, for it costs more than a small collective."""
    return torch.autograd.profiler.record_function(f"shared memory: {name}") if _profiler_enabled() else nullcontext()


@dataclass(frozen=True)
class Transport:
    """How collectives of a group travel. `reason`: why not through shared memory."""

    channel: Channel | None
    reason: str = ""

    def __str__(self) -> str:
        return "shared memory" if self.channel else self.reason


_transports: weakref.WeakKeyDictionary[dist.ProcessGroup, Transport] = weakref.WeakKeyDictionary()


def channel_for(x: torch.Tensor, group: dist.ProcessGroup) -> Channel | None:
    """The channel that `x` takes over `group`, or None: torch.distributed it is.

    The first call with a tensor on the CPU is a collective: all ranks of the group make it.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return None
    return transport(group).channel


def transport(group: dist.ProcessGroup) -> Transport:
    """What collectives of ours on CPU tensors use over `group`. The first call is a collective of the group."""
    found = _transports.get(group)
    if found is None:
        found = _transports[group] = _agree(group)
    return found


def describe(group: dist.ProcessGroup) -> str:
    """How collectives of ours over `group` have travelled so far. No collective."""
    found = _transports.get(group)
    return dist.get_backend(group) if found is None else str(found)


def _gloo(group: dist.ProcessGroup) -> dist.Backend | None:
    """The group's gloo, or None when its CPU tensors go another way, as in simulated worlds."""
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # it has none for CPUs
        return None
    return backend if backend.name() == "gloo" else None


def machine() -> str:
    """Processes with the same string can open each other's files: one kernel, one name space of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return " ".join(
        (platform.node(), boot.read_text() if boot.exists() else "", os.readlink(space) if space.exists() else "")
    )


def _agree(group: dist.ProcessGroup) -> Transport:
    """A channel, or a reason: the same on all ranks, whichever of them it is that cannot."""
    if _gloo(group) is None or group.size() == 1:
        return Transport(None, "not a gloo group of several ranks")
    ranks, code, file, secret = group.size(), _unable(), -1, secrets.randbits(62)
    if code == _WELL and group.rank() == 0:
        file = _new_file(ranks, secret)
        code = _WELL if file >= 0 else _NO_ROOM
    offers = _tell([code, zlib.crc32(machine().encode()), os.getpid(), file, secret], group)
    reason = _refusal([offer[0] for offer in offers])
    places = [offer[1] for offer in offers]
    if not reason and len(set(places)) > 1:
        other = next(rank for rank, place in enumerate(places) if place != places[0])
        reason = f"ranks 0 and {other} are on different machines, or in different containers"
    if reason:
        if file >= 0:
            os.close(file)
        return Transport(None, f"gloo: {reason}")
    native = None
    try:
        if group.rank():
            file = _open_file(*offers[0][2:])
        spins = SPINS if ranks <= len(os.sched_getaffinity(0)) else 0
        native = _cpu.SharedChannel(file, group.rank(), ranks, SLOTS, CHUNK, spins)
    except (OSError, RuntimeError):
        if file >= 0:
            os.close(file)
    reason = _refusal([code for (code,) in _tell([_NOT_OPENED if native is None else _WELL], group)])
    return Transport(None, f"gloo: {reason}") if reason else Transport(Channel(native, group))


def _refusal(codes: list[int]) -> str:
    return next((f"{WHY[code]} (rank {rank})" for rank, code in enumerate(codes) if code), "")


def _tell(values: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """The values of each rank."""
    own = torch.tensor(values, dtype=torch.int64)
    every = [torch.empty_like(own) for _ in range(group.size())]
    trace.collective("all_gather", own, group)
    dist.all_gather(every, own, group=group)
    return [row.tolist() for row in every]


def _new_file(ranks: int, secret: int) -> int:
    """Memory without a name, as a file; -1: there is none to be had. Its last bytes say which one it is."""
    size = _cpu.SharedChannel.bytes(ranks, SLOTS, CHUNK)
    try:
        file = os.memfd_create("megakern", os.MFD_CLOEXEC)
    except OSError:
        return -1
    try:
        os.posix_fallocate(file, 0, size + 8)  # now: a page that is missing later would be a SIGBUS
        os.pwrite(file, secret.to_bytes(8, "little"), size)
    except OSError:
        os.close(file)
        return -1
    return file


def _open_file(pid: int, number: int, secret: int) -> int:
    """Rank 0's file. Raises OSError."""
    file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    if os.pread(file, 8, os.fstat(file).st_size - 8) != secret.to_bytes(8, "little"):
        os.close(file)
        raise OSError("it is another file")
    return file
