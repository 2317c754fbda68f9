"""Bytes of weights, masters, gradients and moments on one rank, from the settings alone: no model is built.

    component      "none"      "fp32"      "split"      bytes a parameter, by `optimizer.master`
    weight         4           2           2
    master         -           4           2            fp32, or the int16 low half
    gradient       4           4           4
    exp_avg        4 (2)       4 (2)       4 (2)        (optimizer.state_dtype = "bfloat16")
    exp_avg_sq     4 (2)       4 (2)       4 (2)

What is gathered for a while under data parallelism (`parallel/data.py`), activations, and the optimizer's step counters
(4 bytes a tensor) come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megakern.config import GPTConfig
from megakern.train.config import OptimizerConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes a parameter of each component, and the parameters of one rank."""

    weight: int
    master: int
    gradient: int
    exp_avg: int
    exp_avg_sq: int
    parameters: int

    @property
    def each(self) -> int:
        """Bytes a parameter."""
        return self.weight + self.master + self.gradient + self.exp_avg + self.exp_avg_sq

    @property
    def total(self) -> int:
        """Bytes on this rank."""
        return self.each * self.parameters

    def __str__(self) -> str:
        parts = ("weight", "master", "gradient", "exp_avg", "exp_avg_sq")
        split = ", ".join(f"{name} {getattr(self, name)}" for name in parts if getattr(self, name))
        return f"{self.each} bytes a parameter ({split}), {self.total / 2**20:,.1f} MiB on this rank"


def state_bytes(
    model: GPTConfig, optimizer: OptimizerConfig, *, tp: int = 1, dp: int = 1, replicas: int = 1, shard: int = 0
) -> StateBytes:
    """Of shard number `shard` of the dp / replicas that data parallelism cuts the states into, in any tp rank.

    The first shard is the largest: each tensor is cut along dim 0 into equal parts, the last ones smaller or empty.
    """
    narrow = optimizer.master != "none"
    moment = {"float32": 4, "bfloat16": 2}[optimizer.state_dtype]
    return StateBytes(
        weight=2 if narrow else 4,
        master={"none": 0, "fp32": 4, "split": 2}[optimizer.master],
        gradient=4,
        exp_avg=moment,
        exp_avg_sq=moment,
        parameters=sum(_elements(shape, cut, tp, dp // replicas, shard) for shape, cut in parameter_shapes(model)),
    )


def _elements(shape: Shape, cut: int | None, tp: int, shards: int, shard: int) -> int:
    local = [size // tp if dim == cut else size for dim, size in enumerate(shape)]
    rows = -(-local[0] // shards)
    count = max(0, min(rows, local[0] - shard * rows))
    for size in local[1:]:
        count *= size
    return count


def parameter_shapes(model: GPTConfig) -> Iterator[tuple[Shape, int | None]]:
    """(whole shape, dim that tensor parallelism cuts or None) of every parameter."""
    C = model.width
    yield (model.padded_vocab_size, C), 0
    if not model.tied_embeddings:
        yield (model.padded_vocab_size, C), 0
    if model.positions == "learned":
        yield (model.sequence_length, C), None
    yield from _norm(model)
    for _ in range(model.layers):
        yield from _block(model)


def _block(model: GPTConfig) -> Iterator[tuple[Shape, int | None]]:
    C, D, F = model.width, model.size_of_head, model.size_of_ffn
    for _ in range(1 if model.parallel_residual else 2):
        yield from _norm(model)
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    yield from _linear((model.heads + 2 * model.key_value_heads) * D, C, qkv_bias, 0)
    yield from _linear(C, model.heads * D, model.bias, 1)
    if model.qk_norm:
        yield from [((D,), None)] * 2
    for _ in range(2 if model.activation == "swiglu" else 1):
        yield from _linear(F, C, model.bias, 0)
    yield from _linear(C, F, model.bias, 1)


def _norm(model: GPTConfig) -> Iterator[tuple[Shape, int | None]]:
    yield (model.width,), None
    if model.norm == "layernorm" and model.bias:
        yield (model.width,), None


def _linear(N: int, K: int, bias: bool, cut: int) -> Iterator[tuple[Shape, int | None]]:
    yield (N, K), cut
    if bias:
        yield (N,), 0 if cut == 0 else None
