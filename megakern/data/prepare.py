"""Text to a folder of token files: train and validation pairs, the tokenizer, and a manifest with hashes of them all.

    OUT/train.bin .idx   OUT/validation.bin .idx   OUT/tokenizer.json   OUT/manifest.json (written last)

The input is read two times, or three when a tokenizer is trained: once to find duplicates and to choose the held-out
documents, then to learn the merges, then to write the tokens. Memory does not grow with the text: some 150 bytes a
document, and a megabyte of text at a time. `PreparedData` opens the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megakern.config import require
from megakern.data.chat import CHAT_FILES, GENERATION_FILE, TEMPLATE_FILE, ChatTemplate
from megakern.data.conversations import TOO_LONG, Conversations, ConversationWriter, Written, answer_ends, text_of
from megakern.data.documents import Documents
from megakern.data.files import DataError, flush_folder, sha256_of_file, write_atomically
from megakern.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from megakern.data.manifest import (
    SCHEMA,
    SPLITS,
    ChatInfo,
    Manifest,
    Options,
    PreparedData,
    Skipped,
    SplitInfo,
    TokenizerInfo,
)
from megakern.data.progress import Progress
from megakern.data.tokenizer import EOD, Tokenizer, train_bpe

__all__ = ["ChatOptions", "Manifest", "PreparedData", "prepare"]

_STAGING = ".prepare.tmp"
_BATCH = 1 << 20  # characters tokenized at once
_DROP, _TRAIN, _VALIDATION = 0, 1, 2

_log = logging.getLogger(__name__)


def prepare(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike = "train",
    vocab_size: int = 4096,
    validation_fraction: float = 0.05,
    text_key: str = "text",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    train_bytes_limit: int = 32_000_000,
    seed: int = 0,
    eod: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    chat: ChatOptions | None = None,
) -> Manifest:
    """Tokenize `inputs` into the folder `out`, as this file's first lines say.

    inputs, text_key, include, exclude, strict: see `Documents`. Exact duplicates are dropped.
    tokenizer: "train" a BPE of `vocab_size` ids on `train_bytes_limit` bytes of the train split (documents that come
    first by hash), "bytes", or a file; eod: see `Tokenizer.load`.
    validation_fraction: in (0, 1); a document is held out when a hash of its text and `seed` falls below it, so that
    it stays on its side when others come or go. If a side would be empty it gets the document nearest to it; if there
    is one document only, its last lines are held out.
    chat: the inputs are conversations (conversations.py), of .jsonl files alone; see `ChatOptions`.
    overwrite: replace a folder that was prepared before. progress: bars on a terminal, else a line now and then.

    Raises ConfigError: an option out of range. DataError: nothing to read, bad input (file and line), `out` is in use.
    DiskFull. Then nothing is left behind, and what `out` held before is untouched.
    """
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    out = Path(out)
    require(0 < validation_fraction < 1, f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    require(train_bytes_limit >= 1, f"train_bytes_limit must be 1 or more, got {train_bytes_limit}")
    require(0 <= seed < 1 << 63, f"seed must be from 0 to 2^63 - 1, got {seed}")
    require(tokenizer != "train" or eod is None, "eod names the token of a tokenizer file; a trained one has its own")
    require(tokenizer != "train" or vocab_size >= 257, f"vocab_size must be 257 or more, got {vocab_size}")
    made = None if tokenizer == "train" else Tokenizer.load(tokenizer, eod=eod)
    how = {"text_key": text_key, "include": include, "exclude": exclude, "leave_out": out, "strict": strict}
    template = chat.load_template(tokenizer, made) if chat else None
    documents = Conversations(inputs, template, **how) if chat else Documents(inputs, **how)
    options = Options(
        tokenizer=str(tokenizer) if tokenizer in ("train", "bytes") else "file",
        vocab_size=vocab_size if tokenizer == "train" else None,
        validation_fraction=float(validation_fraction),
        text_key=text_key,
        include=None if include is None else tuple(include),
        exclude=tuple(exclude),
        train_bytes_limit=train_bytes_limit,
        seed=seed,
    )
    with _staging_folder(out, overwrite) as staging:
        plan = _Plan(documents, options, progress)
        if made is None:
            sample = plan.sample(train_bytes_limit)
            made = train_bpe(map(text_of, sample) if chat else sample, vocab_size)
        made.save(staging / "tokenizer.json")
        if chat:
            written = _write_conversations(plan, documents, made, template, chat, staging)
            text_bytes = {side: split.bytes for side, split in written.items()}
        else:
            text_bytes = _write_tokens(plan, made, staging)
        manifest = Manifest(
            schema=SCHEMA,
            dtype=np.dtype(dtype_for(made.vocab_size)).name,
            held_out=plan.held_out,
            tokenizer=TokenizerInfo(kind=made.kind, vocab_size=made.vocab_size, eod=made.eod, sha256=made.sha256),
            train=_describe(staging / "train", text_bytes[_TRAIN], written[_TRAIN] if chat else None),
            validation=_describe(
                staging / "validation", text_bytes[_VALIDATION], written[_VALIDATION] if chat else None
            ),
            skipped=Skipped(duplicate=plan.duplicates, **documents.skipped),
            options=options,
            chat=chat.describe(template, written.values()) if chat else None,
        )
        _publish(staging, out, manifest)
    return manifest


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What becomes of conversations."""

    template: str | os.PathLike | None = None
    """File of the chat template. None: the one beside the tokenizer's file, else `ChatTemplate`'s default."""
    longest: int | None = None
    """Tokens that a conversation may have: the model's sequence_length + 1, or less. None: any number."""
    too_long: str = "refuse"
    """Longer ones are an error ("refuse"), "cut" at `longest`, or left out ("skip"); the manifest counts them."""

    def __post_init__(self) -> None:
        require(self.longest is None or self.longest >= 2, f"longest must be 2 tokens or more, got {self.longest}")
        require(self.too_long in TOO_LONG, f"too_long must be one of {', '.join(TOO_LONG)}, got {self.too_long!r}")

    def load_template(self, tokenizer: str | os.PathLike, made: Tokenizer | None) -> ChatTemplate:
        special = {"eos_token": made.eod_token if made else EOD}
        if self.template is not None:
            try:
                return ChatTemplate(Path(self.template).read_text(encoding="utf-8"), special)
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{self.template}: cannot read the chat template: {error}") from error
        beside = Path(tokenizer).parent
        if tokenizer in ("train", "bytes") or not (beside / TEMPLATE_FILE).exists():
            return ChatTemplate(special_tokens=special)
        return ChatTemplate.load(beside)

    def describe(self, template: ChatTemplate, written: Iterable[Written]) -> ChatInfo:
        written = list(written)
        counts = {name: sum(getattr(split, name) for split in written) for name in ("cut", "skipped", "without_answer")}
        return ChatInfo(template_sha256=template.sha256, longest=self.longest, too_long=self.too_long, **counts)


class _Plan:
    """The first reading: which document goes where. Later readings are held against it."""

    def __init__(self, documents: Documents, options: Options, progress: bool) -> None:
        self._documents, self._options, self._progress = documents, options, progress
        digests, sizes, duplicate = bytearray(), [], []
        seen: set[bytes] = set()
        for text in self._read("reading"):
            digest, size = self._digest(text)
            duplicate.append(digest in seen)
            seen.add(digest)
            digests += digest
            sizes.append(size)
        if documents.examples:
            total = documents.skipped["undecodable"] + documents.skipped["unreadable"]
            _log.warning("skipped %d that are not UTF-8 or cannot be read, as %s", total, ", ".join(documents.examples))
        if not seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in documents.skipped.items() if count)
            raise DataError(f"{documents.files[0]}: no text in {len(documents.files)} files ({counts or 'no lines'})")
        self._digests = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        self._sizes = np.array(sizes, dtype=np.int64)
        kept = ~np.array(duplicate)
        self.duplicates = int(len(kept) - kept.sum())
        self.held_out = "tail" if len(seen) == 1 else "documents"
        place = self._digests[:, 0] / 2.0**64
        self._sides = np.where(kept, np.where(place < options.validation_fraction, _VALIDATION, _TRAIN), _DROP)
        if self.held_out == "documents":  # no side may be empty
            self._sides[np.argmin(np.where(kept, place, 2.0))] = _VALIDATION
            self._sides[np.argmax(np.where(kept, place, -1.0))] = _TRAIN

    def _read(self, what: str) -> Iterator[str]:
        with Progress(self._documents.size, what, shown=self._progress) as progress:
            yield from self._documents.read(progress.update)

    def _digest(self, text: str) -> tuple[bytes, int]:
        content = text.encode()
        salt = self._options.seed.to_bytes(8, "little")
        return hashlib.blake2b(content, digest_size=16, salt=salt).digest(), len(content)

    def _again(self, what: str) -> Iterator[tuple[int, str]]:
        """(number, text) of all documents. Raises DataError when they are not those of the first reading."""
        for number, text in zip_longest(range(len(self._sides)), self._read(what)):
            if number is None or text is None or self._digest(text)[0] != self._digests[number].tobytes():
                raise DataError(f"{self._documents.files[0]}: the input changed while it was read; prepare it again")
            yield number, text

    def sample(self, limit: int) -> Iterator[str]:
        """Train documents in the order of the second half of their hash, up to `limit` bytes but at least one."""
        train = np.flatnonzero(self._sides == _TRAIN)
        train = train[np.argsort(self._digests[train, 1], kind="stable")]
        count = max(1, int(np.searchsorted(np.cumsum(self._sizes[train]), limit, side="right")))
        chosen = np.zeros(len(self._sides), dtype=bool)
        chosen[train[:count]] = True
        for number, text in self._again("learning the vocabulary"):
            if chosen[number]:
                yield self._cut_tail(text)[0] if self.held_out == "tail" else text

    def split(self) -> Iterator[tuple[int, str]]:
        """(side, text) of everything that is kept."""
        for number, text in self._again("writing tokens"):
            side = int(self._sides[number])
            if side == _DROP:
                continue
            if self.held_out == "tail":
                head, tail = self._cut_tail(text)
                yield _TRAIN, head
                yield _VALIDATION, tail
            else:
                yield side, text

    def _cut_tail(self, text: str) -> tuple[str, str]:
        """Head and tail of the only document, cut at a line end if there is one near enough to leave both."""
        place = len(text) - max(1, round(len(text) * self._options.validation_fraction))
        place = text.rfind("\n", 0, place) + 1 or place
        head, tail = text[:place], text[place:]
        if not head.strip() or not tail.strip():
            raise DataError(
                f"{self._documents.files[0]}: the only document, of {len(text)} characters, is too short to hold out "
                f"its end; add text"
            )
        return head, tail


def _write_tokens(plan: _Plan, tokenizer: Tokenizer, staging: Path) -> dict[int, int]:
    """Both pairs. Returns the UTF-8 bytes of each side."""
    dtype = dtype_for(tokenizer.vocab_size)
    text_bytes = {_TRAIN: 0, _VALIDATION: 0}
    with IndexedWriter(staging / "train", dtype) as train, IndexedWriter(staging / "validation", dtype) as validation:
        writers = {_TRAIN: train, _VALIDATION: validation}
        for batch in _batches(plan.split()):
            ids = tokenizer.encode_arrays([text for _, text in batch])
            for (side, text), document in zip(batch, ids, strict=True):
                writers[side].add_document(np.append(document, np.int32(tokenizer.eod)))
                text_bytes[side] += len(text.encode())
    return text_bytes


def _write_conversations(
    plan: _Plan,
    documents: Conversations,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    chat: ChatOptions,
    staging: Path,
) -> dict[int, Written]:
    """Both splits, the template, and what generation stops at."""
    if plan.held_out == "tail":
        raise DataError(f"{documents.files[0]}: there is one conversation only, and one must be held out; add another")
    how = tokenizer, template, chat.longest, chat.too_long
    with (
        ConversationWriter(staging / "train", *how) as train,
        ConversationWriter(staging / "validation", *how) as other,
    ):
        writers = {_TRAIN: train, _VALIDATION: other}
        for side, conversation in plan.split():
            writers[side].add(conversation, documents.where)
        template.save(staging)
        ends = {"eos_token_ids": answer_ends(writers.values(), tokenizer)}
        write_atomically(staging / GENERATION_FILE, (json.dumps(ends) + "\n").encode())
    return {side: writer.done for side, writer in writers.items()}


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for side, text in documents:
        batch.append((side, text))
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _describe(prefix: Path, text_bytes: int, chat: Written | None) -> SplitInfo:
    dataset = IndexedDataset(prefix)
    answers = prefix.with_name(prefix.name + ".answers")
    return SplitInfo(
        documents=len(dataset),
        tokens=dataset.token_count,
        bytes=text_bytes,
        bin_bytes=dataset.bin_path.stat().st_size,
        bin_sha256=sha256_of_file(dataset.bin_path),
        idx_bytes=dataset.idx_path.stat().st_size,
        idx_sha256=sha256_of_file(dataset.idx_path),
        answers=chat.answers if chat else None,
        answers_sha256=sha256_of_file(answers) if chat else None,
    )


@contextlib.contextmanager
def _staging_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder inside `out` for the files in the making; gone afterwards, and `out` with it if it is new and empty."""
    kinds = ("bin", "idx", "answers")
    names = [*(f"{split}.{kind}" for split in SPLITS for kind in kinds), "tokenizer.json", "manifest.json", *CHAT_FILES]
    present = [name for name in names if (out / name).exists()]
    if present and not overwrite:
        raise DataError(f"{out}: already holds {', '.join(present)}; choose another folder, or pass --overwrite")
    staging = out / _STAGING
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if overwrite and staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
    except FileExistsError as error:
        if not out.is_dir():
            raise DataError(f"{out}: is a file, not a folder; choose another folder") from error
        raise DataError(
            f"{out}: is being prepared ({_STAGING} exists); if a run was killed there, delete it or pass --overwrite"
        ) from error
    except OSError as error:
        raise DataError(f"{out}: cannot make the folder: {error.strerror}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # not empty: it was published
                out.rmdir()


def _publish(staging: Path, out: Path, manifest: Manifest) -> None:
    """Move the files to `out`. A folder counts by its manifest: the old one goes first, the new one comes last."""
    (out / "manifest.json").unlink(missing_ok=True)
    for name in (*CHAT_FILES, *(f"{split}.answers" for split in SPLITS)):  # of conversations that were here before
        (out / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir()):
        os.replace(path, out / path.name)
    flush_folder(out)
    write_atomically(out / "manifest.json", manifest.content())
