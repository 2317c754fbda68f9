"""safetensors files of any size as streams: the header first, then each tensor's bytes as they are made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CODES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""dtype -> (its name in a header, bytes an element)."""


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: dict[str, tuple[int, ...]]
    """Name -> shape, in the order of the file."""


def shards_of(shapes: dict[str, tuple[int, ...]], dtype: str, limit: int) -> list[Shard]:
    """The files for tensors of `shapes`, in order, each at most `limit` bytes where one tensor is not larger."""
    item = CODES[dtype][1]
    groups: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if not groups or size > room:
            groups.append({})
            room = limit
        groups[-1][name] = shape
        room -= size
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def header(shard: Shard, dtype: str) -> bytes:
    """The length and the JSON, padded so that the data starts at a multiple of 8."""
    code, item = CODES[dtype]
    table: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shard.tensors.items():
        end = position + math.prod(shape) * item
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(shards: list[Shard], dtype: str) -> bytes:
    """model.safetensors.index.json for several shards."""
    total = sum(math.prod(shape) for shard in shards for shape in shard.tensors.values()) * CODES[dtype][1]
    where = {name: shard.file for shard in shards for name in shard.tensors}
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(table, indent=2) + "\n").encode()
