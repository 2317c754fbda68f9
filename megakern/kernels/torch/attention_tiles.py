"""Attention in tiles, for what PyTorch's own kernels do not compute or compute slower. See attention.py.

A tile is some samples x some key-value heads x a chunk of query rows. Its scores (n, rows G, keys) stay in the level 2
cache between the matmuls, and cover only keys that some row can see. The G query heads of a group are rows of one
matmul, so keys and values are never repeated. One sample at a time is a view of the input and needs no copy; short
sequences are copied, so that one matmul serves several samples. Matmul results are contiguous and copied to their
place: torch computes strided results head by head, 1.5 times slower. The backward pass recomputes the probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megakern.kernels.torch import dropout

aten = torch.ops.aten

# Measured fp32, two AVX-512 cores, forward + backward, (12, 256, 6, 64) / (4, 512, 12, 64), ms: chunks of 64 27 / 60,
# 128 27 / 55, 256 32 / 60; tiles of 1 MB 29 / 59, 2 MB 27 / 55, 4 MB 27 / 51.
CHUNK = 128  # query rows of a tile
TILE = 1 << 19  # scores of a tile: 2 MB in fp32


@dataclass(frozen=True)
class Rules:
    """What does not change from tile to tile. left, right: visible keys beside the own one, None without a limit."""

    left: int | None
    right: int | None
    scale: float
    softcap: float
    dropout_p: float
    seed: int
    first_sample: int
    first_head: int
    slopes: torch.Tensor | None = None
    """ALiBi, (H,) or (B, H)."""

    @classmethod
    def of(cls, window, scale, softcap, dropout_p, dropout_key, slopes=None) -> Rules:
        """From the arguments of the launchers."""
        left, right = (None if side < 0 else side for side in window)
        return cls(left, right, scale, softcap, dropout_p, *dropout_key, slopes)

    def of_sequence(self, index: int) -> Rules:
        """Those of one packed sequence."""
        several = self.slopes is not None and self.slopes.ndim == 2
        return replace(self, slopes=self.slopes[index]) if several else self

    def blind_rows(self, T: int, S: int) -> int:
        """The first so many rows see no key at all. Row t stands beside key t + S - T."""
        if S == 0:
            return T
        return 0 if self.right is None else min(T, max(0, T - S - self.right))

    def visible(self, first: int, last: int, offset: int, S: int) -> tuple[int, int]:
        """Keys [low, high) that some row in [first, last) can see; offset = S - T."""
        low = 0 if self.left is None else max(0, first + offset - self.left)
        high = S if self.right is None else min(S, last + offset + self.right)
        return low, high

    def widest(self, rows: int, S: int) -> int:
        """The most keys that `rows` neighbouring rows can see."""
        return S if self.left is None or self.right is None else min(S, rows + self.left + self.right)


def forward(q, k, v, rules, sample, dtype):
    """-> out (B, T, H, D), lse (B, H, T) in fp32 or fp64; matmuls and scores in `dtype`."""
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    G = H // Hkv
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=torch.promote_types(dtype, torch.float32), device=q.device)
    blind = rules.blind_rows(T, S)
    out[:, :blind] = 0
    lse[:, :, :blind] = -torch.inf
    tables = _mask_tables(rules, dtype, q.device)
    # lse = largest score - log of its probability: cheaper than the sum of exponentials, which softmax does not give.
    largest_score, largest_p = (q.new_empty(B, Hkv, T * G, dtype=dtype) for _ in range(2))
    for samples, heads, chunk, width in _tiles(B, T - blind, S, Hkv, G, rules):
        query_heads = _query_heads(heads, G)
        rows = _rows(q[samples, :, query_heads], heads, dtype)
        keys, values = (_rows(x[samples, :, heads], heads, dtype) for x in (k, v))
        n = rows.shape[0]
        score_buffer, part_buffer = (q.new_empty(n * chunk * G * columns, dtype=dtype) for columns in (width, D))
        for first in range(blind, T, chunk):
            last = min(T, first + chunk)
            low, high = rules.visible(first, last, S - T, S)
            tile_rows = slice(first * G, last * G)
            scores = _shaped(score_buffer, n, (last - first) * G, high - low)
            _score(scores, rows[:, tile_rows], keys[:, low:high], rules)
            _bias(scores, samples, query_heads, first, last, low, high, G, S - T, rules)
            _mask(scores, first, last, low, high, S - T, rules, tables)
            by_sample = scores.unflatten(0, (-1, heads.stop - heads.start))
            torch.amax(by_sample, -1, out=largest_score[samples, heads, tile_rows])
            aten._softmax.out(scores, -1, False, out=scores)
            torch.amax(by_sample, -1, out=largest_p[samples, heads, tile_rows])
            if rules.dropout_p > 0:
                scores.mul_(_keep(samples, query_heads, first, last, low, high, G, rules, sample, scores))
            part = torch.bmm(scores, values[:, low:high], out=_shaped(part_buffer, n, (last - first) * G, D))
            _store(out[samples, first:last, query_heads], part, G)
    found = largest_score.to(lse.dtype).sub_(largest_p.to(lse.dtype).log_()).view(B, Hkv, T, G).transpose(2, 3)
    lse[:, :, blind:].unflatten(1, (Hkv, G)).copy_(found[..., blind:])
    return out, lse


def backward(dout, q, k, v, lse, rules, sample, dtype):
    """-> dq, dk, dv, contiguous; matmuls and scores in `dtype`. lse: where it is not that of the keys alone."""
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    G = H // Hkv
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    blind = rules.blind_rows(T, S)
    dq[:, :blind] = 0
    if B == 0 or H == 0 or blind == T:
        return dq, dk.zero_(), dv.zero_()
    tables = _mask_tables(rules, dtype, q.device)
    for samples, heads, chunk, width in _tiles(B, T - blind, S, Hkv, G, rules):
        query_heads = _query_heads(heads, G)
        rows, drows = (_rows(x[samples, :, query_heads], heads, dtype) for x in (q, dout))
        keys, values = (_rows(x[samples, :, heads], heads, dtype) for x in (k, v))
        logs = None if lse is None else _rows(lse[samples, query_heads].transpose(1, 2)[..., None], heads, dtype)
        n = rows.shape[0]
        score_buffers = [q.new_empty(n * chunk * G * width, dtype=dtype) for _ in range(3 if rules.softcap else 2)]
        part_buffer = q.new_empty(n * max(chunk * G, width) * D, dtype=dtype)
        dkeys, dvalues = _Sum(n, S, D, dtype, q.device), _Sum(n, S, D, dtype, q.device)
        # From the end: with a causal mask the last chunk sees all keys, and its products are where the sums start.
        for first in reversed(range(blind, T, chunk)):
            last = min(T, first + chunk)
            low, high = rules.visible(first, last, S - T, S)
            p, dp, *slope = (_shaped(buffer, n, (last - first) * G, high - low) for buffer in score_buffers)
            row, drow = rows[:, first * G : last * G], drows[:, first * G : last * G]
            _score(p, row, keys[:, low:high], rules)
            if slope:  # of the cap: 1 - tanh^2
                torch.mul(p, p, out=slope[0]).mul_(-1.0 / rules.softcap**2).add_(1.0)
            _bias(p, samples, query_heads, first, last, low, high, G, S - T, rules)
            _mask(p, first, last, low, high, S - T, rules, tables)
            if logs is None:
                aten._softmax.out(p, -1, False, out=p)
            else:
                p.sub_(logs[:, first * G : last * G]).exp_()
            torch.bmm(drow, values[:, low:high].transpose(1, 2), out=dp)
            dropped = p
            if rules.dropout_p > 0:
                keep = _keep(samples, query_heads, first, last, low, high, G, rules, sample, p)
                dp.mul_(keep)
                dropped = keep.mul_(p)
            dvalues.add(dropped.transpose(1, 2), drow, low, high, 1.0, part_buffer)
            aten._softmax_backward_data.out(dp, p, -1, dtype, grad_input=dp)
            if slope:
                dp.mul_(slope[0])
            dkeys.add(dp.transpose(1, 2), row, low, high, rules.scale, part_buffer)
            part = _shaped(part_buffer, n, (last - first) * G, D)
            part.baddbmm_(dp, keys[:, low:high], beta=0, alpha=rules.scale)
            _store(dq[samples, first:last, query_heads], part, G)
        _store(dk[samples, :, heads], dkeys.total, 1)
        _store(dv[samples, :, heads], dvalues.total, 1)
    return dq, dk, dv


class _Sum:
    """Sum of matmuls over chunks, (n, S, D), at least fp32."""

    def __init__(self, n, S, D, dtype, device):
        self.total = torch.empty(n, S, D, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.started = False

    def add(self, a, b, low, high, alpha, part_buffer):
        """total[:, low:high] += alpha a @ b"""
        n, S, D = self.total.shape
        if not self.started and (low, high) == (0, S) and a.dtype == self.total.dtype:
            self.total.baddbmm_(a, b, beta=0, alpha=alpha)
        else:
            if not self.started:
                self.total.zero_()
            part = _shaped(part_buffer, n, high - low, D)
            self.total[:, low:high].add_(part.baddbmm_(a, b, beta=0, alpha=alpha))
        self.started = True


def _tiles(B, T, S, heads, G, rules):
    """(samples, key-value heads: slices; rows of a chunk, width of its scores): as many as fit in TILE, or one."""
    if min(B, T, heads) <= 0:
        return
    chunk = min(CHUNK, T)
    width = rules.widest(chunk, S)
    per_head = chunk * G * width
    head_step = min(heads, max(1, TILE // per_head))
    sample_step = max(1, TILE // (per_head * heads)) if head_step == heads else 1
    for sample in range(0, B, sample_step):
        for head in range(0, heads, head_step):
            yield slice(sample, min(B, sample + sample_step)), slice(head, min(heads, head + head_step)), chunk, width


def _query_heads(heads: slice, G: int) -> slice:
    return slice(heads.start * G, heads.stop * G)


def _rows(x, heads, dtype):
    """(B, T, h G, D) -> (B h, T G, D) of `dtype`, h = the length of `heads`; a view where the strides allow it."""
    h = heads.stop - heads.start
    return x.to(dtype).unflatten(2, (h, -1)).transpose(1, 2).reshape(x.shape[0] * h, -1, x.shape[-1])


def _store(destination, part, G):
    """destination (B, t, h G, D) = part (B h, t G, D)."""
    by_head = destination.unflatten(2, (-1, G)).transpose(1, 2)
    by_head.copy_(part.view(by_head.shape))


def _shaped(buffer, *shape):
    size = 1
    for length in shape:
        size *= length
    return buffer[:size].view(shape)


def _score(scores, rows, keys, rules):
    if rules.softcap:
        scores.baddbmm_(rows, keys.transpose(1, 2), beta=0, alpha=rules.scale / rules.softcap)
        scores.tanh_().mul_(rules.softcap)
    else:
        scores.baddbmm_(rows, keys.transpose(1, 2), beta=0, alpha=rules.scale)


def _bias(scores, samples, query_heads, first, last, low, high, G, offset, rules):
    """scores (samples heads, rows G, keys) -= slope |distance to the own key|."""
    if rules.slopes is None:
        return
    rows, keys = (torch.arange(*ends, device=scores.device) for ends in ((first, last), (low, high)))
    distance = (keys - (rows[:, None, None] + offset)).abs_().to(scores.dtype)  # (rows, 1, keys)
    slopes = rules.slopes[None] if rules.slopes.ndim == 1 else rules.slopes[samples]
    slopes = slopes[:, query_heads].unflatten(1, (-1, 1, G, 1)).to(scores.dtype)  # (1 or samples, heads, 1, G, 1)
    scores.view(-1, slopes.shape[1], last - first, G, high - low).sub_(slopes * distance)


def _mask_tables(rules, dtype, device):
    """What to add for the right and the left limit: -inf on and above the diagonal, -inf below it."""
    infinite = torch.full((CHUNK, CHUNK), -torch.inf, dtype=dtype, device=device)
    return (
        None if rules.right is None else infinite.triu(),
        None if rules.left is None else infinite.tril(-1),
    )


def _mask(scores, first, last, low, high, offset, rules, tables):
    """Add -inf where row t may not see key j: only columns that some row of the chunk sees and another does not."""
    c = last - first
    by_row = scores.view(scores.shape[0], c, -1, high - low)
    right, left = tables
    if right is not None:
        start = first + offset + rules.right + 1  # the first key that row `first` does not see
        if start < high:
            by_row[..., start - low :].add_(right[:c, None, : high - start])
    if left is not None:
        start = first + offset - rules.left  # the first key that row `first` sees, may be negative
        stop = last - 1 + offset - rules.left  # keys from here on are visible to the last row
        if stop > low:
            by_row[..., : stop - low].add_(left[:c, None, low - start : stop - start])


def _keep(samples, query_heads, first, last, low, high, G, rules, sample, like):
    """Dropout multipliers like `like`, (samples heads, rows G, keys); the key chain is (sample, head, row)."""
    device = like.device
    sample_index = torch.arange(samples.start, samples.stop, device=device).add_(rules.first_sample + sample)
    head_index = torch.arange(query_heads.start, query_heads.stop, device=device).add_(rules.first_head)
    key = dropout.fold(dropout.seed_key(rules.seed, device), sample_index.view(-1, 1, 1, 1))
    key = dropout.fold(key, head_index.view(-1, 1, G))
    key = dropout.fold(key, torch.arange(first, last, device=device).view(-1, 1))
    low_half, high_half = (half.view(*like.shape[:2], 1) for half in dropout.split_key(key))
    return dropout.keep_scale(
        low_half, high_half, dropout.column_counters(low, high, device), rules.dropout_p, like.dtype
    )
