"""Sequence-parallel collectives in pieces, beside the matrix products that read or make them.

    gather_then            x (..., T/R, K) -> compute(all tokens)       piece i + 1 arrives while piece i is computed
    then_reduce_scatter    compute(x) (..., T, N) -> (..., T/R, N)      piece i leaves while piece i + 1 is computed

A piece is a range of every rank's tokens. All all-gathers are enqueued before the first product; each runs on the
process group's own stream and is awaited by an event, so nothing depends on CUDA_DEVICE_MAX_CONNECTIONS. Results are
those of the whole to rounding (a product of fewer rows may add in another order).

The fused operators are torch's own over symmetric memory (torch.distributed._symmetric_memory): products and
peer-to-peer copies of R pieces in one operator.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.parallel.collectives import start_gather_sequence, start_reduce_scatter_sequence, tokens_each

PIECES = 4
"""More pieces hide more of the collective and make smaller products."""

DEFAULT_ROWS = {"cuda": 512}
"""Rows a rank from which collectives are cut, by device type; `python -m benchmarks.tune_overlap` measures. 512 is
expected, and not yet measured between GPUs: of fewer rows a product is too short to hide a collective's latency. On
CPUs never: who copies uses the very cores that multiply. An MLP of width 384 on two cores of a Xeon with AMX, whole
against in pieces, ms: shared memory 7.4, 10.8 (64 rows a rank), 33.5, 44.1 (256), 55.0, 64.8 (1024), 211, 251 (4096);
gloo 25.4, 31.4, 37.6, 52.1, 83.5, 87.4, 307, 300."""


def pieces_for(rows: int, overlap_rows: int | None, device: torch.device) -> int:
    """Into how many pieces a collective of `rows` rows a rank is cut. overlap_rows None: the default; 0: never."""
    least = DEFAULT_ROWS.get(device.type, 0) if overlap_rows is None else overlap_rows
    return PIECES if least and rows >= least else 1


def gather_then(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    compute: Callable[..., tuple[torch.Tensor, ...]],
    pieces: int,
    beside: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, ...]:
    """compute(all-gather of x, *beside), x (..., T/R, K), beside (..., T, C_i); compute works row by row:
    (..., rows, K) and (..., rows, C_i) -> tensors (..., rows, N_i). Pieces of what is beside are copies."""
    if pieces == 1:
        return compute(start_gather_sequence(x, group).wait(), *beside)
    size = group.size()
    arriving = [start_gather_sequence(piece, group) for piece in x.chunk(pieces, dim=-2)]
    cut = [rows.unflatten(-2, (size, x.shape[-2])).chunk(pieces, dim=-2) for rows in beside]
    parts = [compute(piece.wait(), *(rows[i].flatten(-3, -2) for rows in cut)) for i, piece in enumerate(arriving)]
    by_rank = [
        [part.unflatten(-2, (size, part.shape[-2] // size)) for part in column] for column in zip(*parts, strict=True)
    ]
    return tuple(torch.cat(column, dim=-2).flatten(-3, -2) for column in by_rank)


def then_reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup, compute: Callable[[torch.Tensor], torch.Tensor], pieces: int
) -> torch.Tensor:
    """reduce-scatter of compute(x), x (..., T, K); compute works row by row: (..., rows, K) -> (..., rows, N)."""
    if pieces == 1:
        return start_reduce_scatter_sequence(compute(x), group).wait()
    by_rank = x.unflatten(-2, (group.size(), tokens_each(x.shape[-2], group)))
    leaving = [
        start_reduce_scatter_sequence(compute(piece.flatten(-3, -2)), group) for piece in by_rank.chunk(pieces, dim=-2)
    ]
    return torch.cat([piece.wait() for piece in leaving], dim=-2)


# --- torch's operators over symmetric memory ---


def why_not_fused(device_type: str, tp: int) -> str | None:
    """Why torch's fused operators cannot run on `tp` ranks of this kind of device, or None."""
    if device_type != "cuda":
        return f"symmetric memory needs CUDA devices, these are of type {device_type!r}"
    if not all(hasattr(_operators(), name) for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")):
        return f"torch {torch.__version__} has no fused symmetric-memory operators; use 2.11 or later"
    count = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
    if local % tp:
        return f"tp = {tp} ranks are not all on one machine, which has {local}"
    if not all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count)):
        return "the GPUs of this machine cannot reach each other's memory"
    return None


def _operators():
    import torch.distributed._symmetric_memory  # defines them

    return torch.ops.symm_mem


def fused_gather_matmul(
    x: torch.Tensor, weights: list[torch.Tensor], group: dist.ProcessGroup, *, with_x: bool = False
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """All-gather of x (..., T/R, K), if `with_x`, and its products with each weight (K, N) -> (..., T, N)."""
    trace.collective("fused_all_gather_matmul", x, group)
    operator = _operators().fused_all_gather_matmul
    return operator(x.contiguous(), weights, x.ndim - 2, group.group_name, return_A=with_x)


def fused_matmul_reduce_scatter(x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Reduce-scatter of x (..., T, K) weight (K, N) -> (..., T/R, N). Raises ValueError unless R divides T."""
    tokens_each(x.shape[-2], group)
    trace.collective("fused_matmul_reduce_scatter", x, group)
    return _operators().fused_matmul_reduce_scatter(x, weight, "sum", x.ndim - 2, group.group_name)
