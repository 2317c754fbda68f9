"""Text files, folders and JSON lines to documents, one at a time, in an order that depends on names only."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from megakern.config import require
from megakern.data.files import DataError

LONGEST = 1 << 30
"""Bytes of the longest document that is read: documents are held in memory whole."""


class Documents:
    """The documents of some files and folders; reading again gives the same ones in the same order.

    A folder stands for the files below it, sorted, without hidden files and folders. Links are followed, but each
    folder is read once. `.jsonl` and `.jsonl.gz` hold a JSON object a line, with the document under `text_key`; every
    other file is one document in UTF-8. Memory: the names, and one document.

    files: what will be read. size: their bytes on disk. skipped: counts of what the last `read` left out, by reason:
    "empty" (nothing but white space), "undecodable" (not UTF-8), "unreadable" (broken links, devices, no permission).
    examples: the names of some of them.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike],
        *,
        text_key: str = "text",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        leave_out: Path | None = None,
        strict: bool = False,
    ) -> None:
        """include: in folders, take only files whose name or path below the folder matches one of these patterns
        (`*.py`). exclude: leave out files and folders that match. leave_out: a folder never entered. strict: raise
        where else something is skipped, except for empty documents.

        Raises DataError: an input does not exist, nothing to read. ConfigError: a pattern that is not in a list.
        """
        for name, patterns in (("include", include), ("exclude", exclude)):
            require(not isinstance(patterns, str), f"{name} must be a list of patterns, got the text {patterns!r}")
        self.text_key, self.strict = text_key, strict
        self._include, self._exclude = include, exclude
        self._unreadable: list[str] = []
        self.files: list[Path] = []
        self._named = {Path(each) for each in inputs}
        visited = {_identity(leave_out)} if leave_out is not None and leave_out.exists() else set()
        for path in map(Path, inputs):
            if path.is_dir():
                self._walk(path, "", visited)
            elif path.is_file():
                self.files.append(path)
            else:
                raise DataError(f"{path}: there is no such file or folder")
        if not self.files:
            only = f" that match {', '.join(include)}" if include else ""
            raise DataError(f"{', '.join(map(str, inputs)) or 'no inputs'}: no files{only} were found; check the path")
        self.size = sum(path.stat().st_size for path in self.files)
        self.skipped: dict[str, int] = {}
        self.examples: list[str] = []

    def read(self, on_bytes: Callable[[int], Any] = lambda count: None) -> Iterator[str]:
        """The documents. on_bytes is told of bytes on disk as they are read.

        Raises DataError that names file and line: damaged gz, a line that is not JSON, lacks `text_key` or has no text
        there, a document above LONGEST; with `strict` also for undecodable and unreadable ones.
        """
        self.skipped = {"empty": 0, "undecodable": 0, "unreadable": 0}
        self.examples = []
        for where in self._unreadable:
            self._skip("unreadable", where)
        for path in self.files:
            try:
                file = open(path, "rb")  # noqa: SIM115
            except OSError as error:
                if path in self._named:
                    raise DataError(f"{path}: cannot be read: {error.strerror}") from error
                self._skip("unreadable", str(path))
                continue
            with file:
                if path.name.endswith((".jsonl", ".jsonl.gz")):
                    found = self._lines(path, file, on_bytes)
                else:
                    found = self._whole(path, file, on_bytes)
                for text in found:
                    if not text or text.isspace():
                        self.skipped["empty"] += 1
                    else:
                        yield text

    def _walk(self, folder: Path, below: str, visited: set[tuple[int, int]]) -> None:
        try:
            here = _identity(folder)
            if here in visited:  # a link back up, or a second link to the same folder
                return
            visited.add(here)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            self._unreadable.append(str(folder))
            return
        for entry in entries:
            name = below + entry.name
            if entry.name.startswith(".") or _matches(entry.name, name, self._exclude):
                continue
            if os.path.isdir(entry.path):
                self._walk(Path(entry.path), name + "/", visited)
            elif self._include is None or _matches(entry.name, name, self._include):
                if os.path.isfile(entry.path):
                    self.files.append(Path(entry.path))
                else:
                    self._unreadable.append(entry.path)

    def _skip(self, reason: str, where: str) -> None:
        if self.strict:
            why = {"undecodable": "not UTF-8", "unreadable": "cannot be read"}[reason]
            raise DataError(f"{where}: {why}; mend or exclude it, or prepare without strict to skip it")
        self.skipped[reason] += 1
        if len(self.examples) < 5:
            self.examples.append(where)

    def _whole(self, path: Path, file: BinaryIO, on_bytes: Callable[[int], Any]) -> Iterator[str]:
        content = _bounded(file.read(LONGEST + 1), str(path))
        on_bytes(len(content))
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._skip("undecodable", str(path))
            return
        yield text

    def _lines(self, path: Path, file: BinaryIO, on_bytes: Callable[[int], Any]) -> Iterator[str]:
        packed = path.name.endswith(".gz")
        lines = gzip.GzipFile(fileobj=file) if packed else file
        number = before = 0
        while True:
            try:
                line = lines.readline(LONGEST + 1)
            except (OSError, EOFError, zlib.error) as error:
                action = "unpacked" if packed else "read"
                raise DataError(f"{path}: cannot be {action} after line {number}: {error}") from error
            if not line:
                return
            number += 1
            where = f"{path}:{number}"
            _bounded(line, where)
            after = file.tell()
            on_bytes(after - before)
            before = after
            if line.isspace():
                continue
            try:
                text = self._text_of(line.decode("utf-8-sig"), where)
                text.encode()  # JSON can spell lone surrogates, which no tokenizer takes
            except UnicodeError:
                self._skip("undecodable", where)
                continue
            yield text

    def _text_of(self, line: str, where: str) -> str:
        table = self._table_of(line, where)
        if self.text_key not in table:
            keys = ", ".join(map(repr, list(table)[:10])) or "none"
            raise DataError(
                f"{where}: no key {self.text_key!r}, the line has {keys}; name the key of the text (text_key)"
            )
        text = table[self.text_key]
        if not isinstance(text, str):
            raise DataError(f"{where}: {self.text_key!r} must be text, got {type(text).__name__}")
        return text

    def _table_of(self, line: str, where: str) -> dict[str, Any]:
        try:
            table = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(table, dict):
            raise DataError(f"{where}: a line must be a JSON object, got {type(table).__name__}")
        return table


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _matches(name: str, path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern) for pattern in patterns)


def _bounded(content: bytes, where: str) -> bytes:
    if len(content) > LONGEST:
        raise DataError(f"{where}: the document is longer than {LONGEST >> 20} MiB; cut it into several")
    return content
