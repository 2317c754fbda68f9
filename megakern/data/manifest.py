"""The manifest of a prepared folder, and the folder as it is opened for training."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megakern.config import ConfigError, from_table, require
from megakern.data.chat import TEMPLATE_FILE, ChatTemplate
from megakern.data.files import DataError, sha256_of_file
from megakern.data.indexed import IndexedDataset
from megakern.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    documents: int
    """Documents in the split."""
    tokens: int
    """Tokens in .bin, with one end-of-document token after each document."""
    bytes: int
    """UTF-8 bytes of the documents."""
    bin_bytes: int
    """Size of the .bin file."""
    bin_sha256: str
    """SHA-256 of the .bin file, in hex."""
    idx_bytes: int
    """Size of the .idx file."""
    idx_sha256: str
    """SHA-256 of the .idx file, in hex."""
    answers: int | None = None
    """Chat: tokens that the assistant wrote."""
    answers_sha256: str | None = None
    """Chat: SHA-256 of the .answers file, a byte for each token."""


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    kind: str
    """"bytes" or "tokenizers"."""
    vocab_size: int
    """Number of token ids."""
    eod: int
    """Id of the end-of-document token."""
    sha256: str
    """`Tokenizer.sha256`."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    duplicate: int
    """Documents equal to an earlier one."""
    empty: int
    """Documents of nothing but white space."""
    undecodable: int
    """Files and lines that are not UTF-8."""
    unreadable: int
    """Broken links, devices, files and folders without permission."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `prepare`, as it documents them, without paths."""

    tokenizer: str
    vocab_size: int | None
    validation_fraction: float
    text_key: str
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    train_bytes_limit: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ChatInfo:
    """How conversations were made into documents, and which did not fit."""

    template_sha256: str
    """`ChatTemplate.sha256` of the template beside the manifest."""
    longest: int | None
    """Tokens that a conversation may have. None: any number."""
    too_long: str
    """What became of longer ones: refuse, cut or skip."""
    cut: int
    """Conversations cut at `longest`."""
    skipped: int
    """Conversations left out because they are longer."""
    without_answer: int
    """Conversations left out because no token of an answer was left."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `prepare` made. The same input and options give the same manifest, byte for byte."""

    schema: int
    """Version of this form."""
    dtype: str
    """Type of a token in .bin, as numpy names it."""
    held_out: str
    """"documents": chosen by a hash of their text. "tail": the end of the only document."""
    tokenizer: TokenizerInfo
    train: SplitInfo
    validation: SplitInfo
    skipped: Skipped
    options: Options
    chat: ChatInfo | None = None
    """Of conversations; None: the documents are text."""

    def describe(self) -> str:
        """What was made, for people."""
        rows = [(split, getattr(self, split)) for split in SPLITS]
        lines = [
            f"  {split:<11} {info.documents:>9,} documents {info.bytes / 1e6:>10.2f} MB {info.tokens:>13,} tokens "
            f"{info.bytes / info.tokens:.2f} bytes a token"
            for split, info in rows
        ]
        left_out = ", ".join(f"{count:,} {name}" for name, count in dataclasses.asdict(self.skipped).items() if count)
        lines.append(
            f"  tokenizer   {self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens, {self.tokenizer.sha256[:12]}"
        )
        lines.append(f"  left out    {left_out or 'nothing'}")
        if self.chat:
            answers = ", ".join(f"{info.answers:,} of {split}" for split, info in rows)
            lines.append(f"  answers     {answers} tokens; the loss counts them alone")
            fates = (("cut", "cut"), ("skipped", "left out"), ("without_answer", "left out without an answer"))
            fate = ", ".join(f"{getattr(self.chat, key):,} {text}" for key, text in fates if getattr(self.chat, key))
            limit = "any number of" if self.chat.longest is None else f"{self.chat.longest:,}"
            lines.append(f"  longest     {limit} tokens: {fate or 'all fit'}")
        return "\n".join(lines)

    def content(self) -> bytes:
        table = dataclasses.asdict(self)
        if self.chat is None:
            del table["chat"]
            for split in SPLITS:
                del table[split]["answers"], table[split]["answers_sha256"]
        return (json.dumps(table, indent=1) + "\n").encode()

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Raises DataError: missing, not JSON, another schema, unknown or missing keys."""
        try:
            table = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: there is no such file; {path.parent} was not made by `megakern prepare`, or it did not finish"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        found = table.get("schema") if isinstance(table, dict) else type(table).__name__
        if type(found) is not int or found != SCHEMA:  # true and 1.0 equal 1
            raise DataError(f"{path}: schema must be {SCHEMA}, got {found!r}; prepare the data again with this version")
        try:
            return from_table(cls, table, str(path))
        except ConfigError as error:
            raise DataError(str(error)) from error


class PreparedData:
    """A folder that `prepare` wrote. Opening checks sizes, counts and the tokenizer's hash, `verify` every byte.

    train, validation: IndexedDataset. tokenizer: Tokenizer. manifest: Manifest. template: ChatTemplate of
    conversations, None where the documents are text.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises DataError: not a prepared folder, not finished, a file changed or damaged."""
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder / "manifest.json")
        for path, size, _ in self._files():
            if not path.is_file():
                raise DataError(f"{path}: there is no such file, and the manifest lists it; prepare the data again")
            if path.stat().st_size != size:
                raise DataError(f"{path}: the manifest says {size:,} bytes, the file has {path.stat().st_size:,}")
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        found, wanted = self.tokenizer.sha256, self.manifest.tokenizer.sha256
        if found != wanted:
            raise DataError(
                f"{self.folder / 'tokenizer.json'}: not the tokenizer the data was made with, its hash is {found[:16]} "
                f"and the manifest says {wanted[:16]}; put the old file back, or prepare the data again"
            )
        self.template = self._open_template() if self.manifest.chat else None
        self.train, self.validation = (self._open(split) for split in SPLITS)

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text for each token of "train" or "validation", end-of-document tokens counted."""
        require(split in SPLITS, f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        info: SplitInfo = getattr(self.manifest, split)
        return info.bytes / info.tokens

    def answers(self, split: str) -> np.ndarray:
        """(tokens,) uint8 of "train" or "validation" conversations: 1 where the assistant wrote the token."""
        return np.memmap(self.folder / f"{split}.answers", np.uint8, "r").view(np.ndarray)

    def verify(self) -> None:
        """Read everything and compare the hashes. Raises DataError that names each file that differs."""
        changed = [str(path) for path, _, digest in self._files() if sha256_of_file(path) != digest]
        if changed:
            raise DataError(f"{', '.join(changed)}: damaged, the SHA-256 is not the manifest's; prepare the data again")

    def _files(self) -> Iterator[tuple[Path, int, str]]:
        for split in SPLITS:
            info: SplitInfo = getattr(self.manifest, split)
            yield self.folder / f"{split}.bin", info.bin_bytes, info.bin_sha256
            yield self.folder / f"{split}.idx", info.idx_bytes, info.idx_sha256
            if self.manifest.chat:
                yield self.folder / f"{split}.answers", info.tokens, info.answers_sha256

    def _open_template(self) -> ChatTemplate:
        template = ChatTemplate.load(self.folder)
        if template.sha256 != self.manifest.chat.template_sha256:
            raise DataError(
                f"{self.folder / TEMPLATE_FILE}: not the chat template the data was made with; put the old file back, "
                f"or prepare the data again"
            )
        return template

    def _open(self, split: str) -> IndexedDataset:
        dataset = IndexedDataset(self.folder / split)
        info: SplitInfo = getattr(self.manifest, split)
        found = (dataset.dtype.name, len(dataset), dataset.token_count)
        wanted = (self.manifest.dtype, info.documents, info.tokens)
        if found != wanted:
            raise DataError(f"{dataset.idx_path}: (dtype, documents, tokens) must be {wanted}, got {found}")
        return dataset
