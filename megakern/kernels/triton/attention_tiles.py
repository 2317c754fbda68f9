"""What the Triton attention kernels share: where a block lies, which blocks it meets, scores, visibility, dropout keys.

Row t of a sequence stands beside key t + S - T, its own key. Exponentials are powers of two: scores carry log2(e).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megakern.kernels.triton import attention_configs as configs
from megakern.kernels.triton.attention_configs import head_tile
from megakern.kernels.triton.dropout import fold, seed_key, threshold_of
from megakern.kernels.triton.tile_config import cdiv

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def placed(program, blocks, heads):
    """What a program computes -> sample, head, block. Programs of a head are neighbours, the last block first: with a
    causal mask it has the most keys.

    Packed: sample 0, block of all sequences. Sequence i owns the blocks from offsets[i] // BLOCK + i on, at least as
    many as it has; so T // BLOCK + N are enough for all, with no length known on the host. A kernel searches for the
    sequence itself, with `narrowed`: torch.compile takes what a function returns for an address made from all of its
    arguments, so that offsets which a function loads from would look like tensors that are written.
    """
    return program // blocks // heads, program // blocks % heads, blocks - 1 - program % blocks


@triton.jit
def narrowed(sample, above, offset, block, BLOCK: tl.constexpr):
    """One step to the last sequence whose blocks begin at or before `block`. offset: offsets[(sample + above) // 2]."""
    middle = (sample + above) // 2
    below = offset // BLOCK + middle <= block
    return tl.where(below, middle, sample), tl.where(below, above, middle)


@triton.jit
def keys_seen(first, last, S, left, right, BN: tl.constexpr, LEFT: tl.constexpr):
    """Blocks of keys for rows whose own keys are first to last -> start, whole, ragged, stop.

    Every row sees all keys of [whole, ragged); in [start, whole) and [ragged, stop) the mask decides.
    """
    stop = tl.minimum(S, last + right + 1)
    start = 0
    whole = 0
    if LEFT:
        start = tl.maximum(first - left, 0) // BN * BN
        whole = tl.cdiv(tl.maximum(last - left, 0), BN) * BN
    ragged = tl.maximum(tl.minimum(S, first + right + 1), 0) // BN * BN
    return start, whole, tl.maximum(whole, ragged), stop


@triton.jit
def rows_seeing(first, last, offset, T, left, right, BM: tl.constexpr, LEFT: tl.constexpr):
    """Blocks of rows that see keys first to last -> start, whole, ragged, stop as above."""
    start = tl.maximum(first - right - offset, 0) // BM * BM
    whole = tl.cdiv(tl.maximum(last - right - offset, 0), BM) * BM
    stop = T
    if LEFT:
        stop = tl.minimum(T, last + left - offset + 1)
        ragged = tl.maximum(tl.minimum(T, first + left - offset + 1), 0) // BM * BM
    else:
        ragged = T // BM * BM
    return start, whole, tl.maximum(whole, ragged), stop


@triton.jit
def edges(start, whole, ragged, stop, BLOCK: tl.constexpr):
    """The blocks where the mask decides, before `whole` and from `ragged` on, for one loop -> start, how many there
    are, how many of them lie before, and the gap behind those. With a loop for each side the gradients of keys spilled
    144 bytes on sm_90 instead of 16; the forward pass and the gradient of queries are better off with two.
    """
    before = tl.cdiv(tl.maximum(tl.minimum(whole, stop) - start, 0), BLOCK)
    behind = tl.cdiv(tl.maximum(stop - ragged, 0), BLOCK)
    return start, before + behind, before, ragged - start - before * BLOCK


@triton.jit
def visible(own, cols, S, left, right, LEFT: tl.constexpr):
    """May the row whose own key is `own` see key `cols` (broadcast)?"""
    seen = (cols - own <= right) & (cols < S)
    if LEFT:
        seen &= own - cols <= left
    return seen


@triton.jit
def tile(x, first, stride, limit, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr):
    """Rows first to first + ROWS - 1 of x (..., D) as (ROWS, BD); 0 past D and, with CHECK, past row `limit`."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, BD)
    where = x + tl.cast(first, tl.int64) * stride + (row * stride)[:, None] + col[None, :]
    if CHECK:
        inside = (first + row < limit)[:, None]
        if D < BD:
            inside &= (col < D)[None, :]
        return tl.load(where, inside, 0.0)
    elif D < BD:
        return tl.load(where, (col < D)[None, :], 0.0)
    else:
        return tl.load(where)


@triton.jit
def put(x, value, first, stride, limit, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Write rows first to min(first + ROWS, limit) - 1 of x (..., D)."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, BD)
    where = x + tl.cast(first, tl.int64) * stride + (row * stride)[:, None] + col[None, :]
    tl.store(where, value.to(x.dtype.element_ty), (first + row < limit)[:, None] & (col < D)[None, :])


@triton.jit
def bend(product, scale):
    """tanh(product scale)."""
    return 2.0 * tl.sigmoid(2.0 * scale * product) - 1.0


@triton.jit
def scores(product, own, cols, scale, cap, slope, CAPPED: tl.constexpr):
    """Scores in powers of two, and the tanh of the cap, from products q k. `scale`, `cap`: see `factors`."""
    bent = product
    if CAPPED:
        bent = bend(product, scale)
        value = bent * cap
    else:
        value = product * scale
    if slope is not None:
        value -= slope * tl.abs(own - cols).to(tl.float32)
    return value, bent


@triton.jit
def slope_of(slopes, sample, head, batch_stride):
    """The ALiBi slope of a head in powers of two."""
    return tl.load(slopes + sample * batch_stride + head) * LOG2_E


@triton.jit
def head_key(seed, sample, head):
    """The dropout key of a head; its rows are folded in next."""
    return fold(fold(seed_key(seed), sample), head)


# --- launchers ---

UNLIMITED = 1 << 29  # a side of the window: more than any length, and sums of two still fit in 32 bits

# Lengths, counts and keys change from call to call: no machine code of their own for a 1 or a multiple of 16.
CHANGING = ["T", "S", "N", "H", "G", "blocks", "left", "right", "seed", "first_sample", "first_head", "threshold"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call, in the form that the kernels take. Tensors are those of `by_rows`."""

    q: torch.Tensor
    k: torch.Tensor
    q_offsets: torch.Tensor | None
    k_offsets: torch.Tensor | None
    slopes: torch.Tensor | None
    window: tuple[int, int]
    scale: float
    softcap: float
    dropout_p: float
    dropout_key: tuple[int, int, int]

    @property
    def samples(self) -> int:
        """Samples on the grid; packed sequences are found by the programs themselves."""
        return self.q.shape[0] if self.q_offsets is None else 1

    def choice(self, role: str) -> configs.Choice:
        """The configurations that a kernel may run with."""
        plain = not self.softcap and self.slopes is None and self.dropout_p == 0
        kind = configs.attention_kind(tuple(self.window), plain, self.q_offsets is not None)
        return configs.attention(role, self.q.shape[-1], self.q.dtype, self.q.shape[-3], self.k.shape[-3], kind)

    def blocks(self, rows: int, size: int) -> int:
        """Blocks of `size` that cover `rows` rows, of each sample or of all packed sequences; see `placed`."""
        return cdiv(rows, size) if self.q_offsets is None else rows // size + self.q_offsets.shape[0] - 1

    @property
    def tensors(self) -> tuple:
        return self.q_offsets, self.k_offsets, None if self.slopes is None else self.slopes.contiguous()

    @property
    def slope_batch(self) -> int:
        return 0 if self.slopes is None or self.slopes.ndim == 1 else self.slopes.shape[1]

    def numbers(self, blocks: int) -> tuple:
        """What the kernels name T, S, ..., kept."""
        left, right = (UNLIMITED if side < 0 else side for side in self.window)
        scale = self.scale / self.softcap if self.softcap else self.scale * LOG2_E.value
        T, H, Hkv = self.q.shape[-3], self.q.shape[-2], self.k.shape[-2]
        N = 0 if self.q_offsets is None else self.q_offsets.shape[0] - 1
        sizes = (T, self.k.shape[-3], N, H, H // Hkv, blocks)
        dropout = (*self.dropout_key, threshold_of(self.dropout_p), 1.0 / (1.0 - self.dropout_p))
        return *sizes, left, right, scale, self.softcap * LOG2_E.value, *dropout

    @property
    def constants(self) -> dict[str, object]:
        D = self.q.shape[-1]
        return {
            "LEFT": self.window[0] >= 0,
            "CAPPED": self.softcap > 0,
            "DROPOUT": self.dropout_p > 0,
            "PRECISION": "ieee",
            "D": D,
            "BD": head_tile(D),
        }


def by_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies of those whose last dim is not contiguous, or whose rows are so far apart that a tile leaves 32 bits."""
    return tuple(x if x.stride(-1) == 1 and x.stride(-3) < 1 << 22 else x.contiguous() for x in tensors)


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """(batch, row, head) of each tensor (..., T, H, D); batch 0 for packed ones."""
    return tuple(n for x in tensors for n in ((0,) if x.ndim == 3 else (x.stride(0),)) + (x.stride(-3), x.stride(-2)))


def lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) of (B, H, T) or (H, T), contiguous."""
    H, T = lse.shape[-2:]
    return (0 if lse.ndim == 2 else H * T), T
