"""A Hugging Face folder that may come from a stranger: names checked before a file is opened, sizes before a byte is
allocated, and all that is wrong is collected. safetensors only: a pickle is never opened.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megakern.model.hf.writing import INDEX, SINGLE

MAX_JSON = 256 * 2**20
"""Largest JSON file that is read, in bytes; a tokenizer of 250,000 ids has about 30 million."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def file_problem(folder: Path, name: str) -> str | None:
    """Why `name` cannot be read as a plain file of `folder`; None when it can, or is not there.

    A link must lead to a file of the folder, or, as in the cache of huggingface_hub, from `snapshots/<revision>` to the
    `blobs` beside it.
    """
    path = folder / name
    try:
        if not os.path.lexists(path):
            return None
        target = path.resolve(strict=True)
        root = folder.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if path.is_symlink() and not target.is_relative_to(root) and target.parent != blobs:
            return f"{name}: a link that leads out of the folder; it is not followed"
        if not stat.S_ISREG(target.stat().st_mode):
            return f"{name}: not a plain file"
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    return None


def read_json(folder: Path, name: str, problems: list[str]) -> Any:
    """The JSON in a file of the folder; None when it is not there, and when a problem was added."""
    if problem := file_problem(folder, name):
        problems.append(problem)
        return None
    path = folder / name
    if not path.exists():
        return None
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            problems.append(f"{name}: {size} bytes are more than the {MAX_JSON} that are read")
            return None
        return json.loads(path.read_bytes())
    except OSError as error:
        problems.append(f"{name}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}: not JSON: {error}")
    return None


class Weights:
    """The tensors of a folder's safetensors files, by name: `shapes`, `dtypes` (as "float32"), and `read` of a slice.

    Files are mapped; a slice is all that is copied. Whatever is wrong is added to `problems`, and what has a problem is
    left out. `prefix`: added to every name when no tensor's name starts so, as in the file of a base model.
    """

    def __init__(self, folder: Path, problems: list[str], *, prefix: str = "") -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._slices: dict[str, Any] = {}
        self._files = []
        where: dict[str, str] = {}
        for file in self._file_names(problems):
            self._open(file, where, problems)
        if self._index is not None:
            self._compare_with_index(where, problems)
        if where and prefix and not any(name.startswith(prefix) for name in where):
            for table in (self.shapes, self.dtypes, self._slices):
                renamed = {name if name == "lm_head.weight" else prefix + name: value for name, value in table.items()}
                table.clear()
                table.update(renamed)

    def read(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        stored = self._slices[name]
        return stored[rows] if columns is None else stored[rows, columns]

    def close(self) -> None:
        self._slices.clear()
        self._files.clear()

    def _file_names(self, problems: list[str]) -> list[str]:
        self._index: dict[str, str] | None = None
        # Others may hold the same weights once more under other names, as consolidated.safetensors of Mistral.
        found = {path.name for path in self.folder.glob("model*.safetensors")}
        if not os.path.lexists(self.folder / INDEX):
            if found == {SINGLE}:
                return [SINGLE]
            if not found:
                pickles = sorted(path.name for path in self.folder.glob("*.bin"))
                more = f" There is {pickles[0]}, a pickle, which can run code and is not read." if pickles else ""
                problems.append(
                    f"{SINGLE}: missing.{more} Save the model as safetensors (transformers: save_pretrained)"
                )
            else:
                problems.append(f"{INDEX}: missing, which files must have that are not one {SINGLE}")
            return []
        table = read_json(self.folder, INDEX, problems)
        where = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            if table is not None:
                problems.append(f"{INDEX}: weight_map must be an object of tensor name to file name")
            return []
        self._index, good = where, []
        for file in sorted(set(where.values())):
            if not _SHARD.fullmatch(file) or ".." in file:
                problems.append(f"{INDEX}: {file[:200]!r} cannot be the name of a shard; it must be a plain file name")
            elif not os.path.lexists(self.folder / file):
                problems.append(f"{file}: missing, {INDEX} names it")
            else:
                good.append(file)
        unknown = sorted(found - set(where.values()))
        if unknown:
            problems.append(f"{', '.join(unknown)}: not in {INDEX}")
        return good

    def _open(self, file: str, where: dict[str, str], problems: list[str]) -> None:
        if problem := file_problem(self.folder, file):
            problems.append(problem)
            return
        try:
            # The library checks lengths, that offsets do not overlap or leave the file, and that shape x dtype fits.
            opened = safe_open(self.folder / file, framework="pt")
            self._files.append(opened)
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in where:
                    problems.append(f"{name}: both in {where[name]} and in {file}")
                    continue
                stored = opened.get_slice(name)
                where[name] = file
                self._slices[name] = stored
                self.shapes[name] = tuple(stored.get_shape())
                self.dtypes[name] = _DTYPES.get(stored.get_dtype(), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: damaged or cut short, not readable as safetensors: {error}")

    def _compare_with_index(self, where: dict[str, str], problems: list[str]) -> None:
        opened = set(where.values())
        for name, file in sorted(self._index.items()):
            if file in opened and where.get(name) != file:
                actual = f"it is in {where[name]}" if name in where else "it is not there"
                problems.append(f"{name}: {INDEX} says it is in {file}, but {actual}")
        for name in sorted(set(where) - set(self._index)):
            problems.append(f"{name}: in {where[name]}, but not in {INDEX}")
