"""Text to token ids and back: bytes (built in), any file of the `tokenizers` library, and training a byte-level BPE.

Every tokenizer has an end-of-document token, `eod`. Text never makes special tokens unless asked: a document in which
somebody wrote "<|endoftext|>" does not end there.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from megakern.config import require
from megakern.data.files import DataError, write_atomically

EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
"""Names by which the end-of-document token of a foreign tokenizer is looked for, in this order."""

# How text is cut before merges are counted: a word with the one character before it (a space, a dot, an underscore);
# each digit alone; punctuation with the line end after it and the indentation of the next line, less the one space that
# goes with the word there; other white space. Measured on Python's standard library with 4096 ids: 3.40 bytes a token,
# where GPT-2's pattern gives 3.21 and GPT-4's 3.27.
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+(?:[ \t]+(?=[ \t]))?)?|\s+(?!\S)|\s+"

_FORMAT = "megakern_tokenizer"
_PIECE = 1 << 18  # characters encoded at once: the library keeps some 100 bytes a token, and a text can be 1 GB


class Tokenizer:
    """What all tokenizers have in common; make one with `Tokenizer.load` or `train_bpe`.

    vocab_size: number of ids. eod: id of the end-of-document token, eod_token its text. sha256: hash of what `save`
    writes, whatever its layout; equal hashes mean equal ids for every text.
    """

    kind: str
    vocab_size: int
    eod: int
    eod_token: str
    special_tokens: tuple[str, ...]
    """Names that `encode` turns into one token only with `allow_special`."""

    @staticmethod
    def load(source: str | os.PathLike, *, eod: str | None = None) -> Tokenizer:
        """The tokenizer "bytes", or the one in a file: `save`d by us, or any `tokenizers` JSON.

        eod: name of the end-of-document token, where it is none of EOD_NAMES. Raises DataError: no such file, not a
        tokenizer, no end-of-document token.
        """
        if source == "bytes":
            require(eod in (None, EOD), f"the tokenizer 'bytes' has the end-of-document token {EOD}, not {eod!r}")
            return ByteTokenizer()
        path = Path(source)
        try:
            table = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer, {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a tokenizer file, it must be JSON: {error}") from error
        if not isinstance(table, dict):
            raise DataError(f"{path}: not a tokenizer file, it must hold a JSON object, got {type(table).__name__}")
        if _FORMAT in table:
            if table == ByteTokenizer().content():
                return ByteTokenizer()
            if set(table) != {_FORMAT, "eod", "tokenizer"} or table[_FORMAT] != 1 or not isinstance(table["eod"], str):
                raise DataError(f"{path}: a megakern tokenizer of a form this version does not know")
            eod = eod or table["eod"]
            table = table["tokenizer"]
        return JsonTokenizer(table, eod=eod, name=str(path))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with nothing added. allow_special: names of special tokens in the text become these tokens.

        Raises DataError for text that has no UTF-8 form (a lone surrogate).
        """
        raise NotImplementedError

    def encode_with_starts(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[int]]:
        """`encode` of `text`, and for each id the number of the first character that it stands for or is part of."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` of a text to be continued, with what the tokenizer's file puts around a text, as Llama's <s>."""
        return self.encode(text)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text as an integer array (n,): a tenth of the memory of lists. Threads where it can."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; U+FFFD for what is not UTF-8. Raises DataError: id out of range."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for, or None where that depends on its neighbours."""
        raise NotImplementedError

    def content(self) -> dict:
        """What `save` writes, as a JSON object."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write a file that `load` accepts, atomically; `tokenizers` reads it too, unless `eod` had to be named."""
        write_atomically(path, (json.dumps(self.content(), indent=1) + "\n").encode())

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def _check_ids(self, ids: list[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(each for each in ids if not 0 <= each < self.vocab_size)
            raise DataError(f"token id {wrong} is out of range, the tokenizer has {self.vocab_size} ids")


class ByteTokenizer(Tokenizer):
    """One id for each of the 256 bytes of UTF-8, and id 256 for the end of a document."""

    kind = "bytes"
    vocab_size = 257
    eod = 256
    eod_token = EOD
    special_tokens = (EOD,)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return list(_utf8(text))
        ids: list[int] = []
        for i, part in enumerate(text.split(EOD)):
            ids += ([self.eod] if i else []) + list(_utf8(part))
        return ids

    def encode_with_starts(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[int]]:
        ids, starts, place = [], [], 0
        for i, part in enumerate(text.split(EOD) if allow_special else [text]):
            if i:
                ids.append(self.eod)
                starts.append(place)
                place += len(EOD)
            for character in part:
                own = _utf8(character)
                ids += own
                starts += [place] * len(own)
                place += 1
        return ids, starts

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(each) for each in ids]
        self._check_ids(ids)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return EOD.encode() if token == self.eod else bytes((token,))

    def content(self) -> dict:
        return {_FORMAT: 1, "kind": "bytes", "vocab_size": 257, "eod": EOD}


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, table: dict, *, eod: str | None = None, name: str = "tokenizer") -> None:
        """table: the JSON object. eod: as in `load`. name: for messages. Raises DataError like `load`."""
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(table))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{name}: not a file of the tokenizers library: {error}") from error
        self._library.no_truncation()  # files of encoder models carry a length limit, which would drop text
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        found = next((known for known in EOD_NAMES if known in vocabulary), None)
        if (eod or found) not in vocabulary:
            wanted = f"the token {eod!r}" if eod else f"an end-of-document token ({', '.join(EOD_NAMES)})"
            raise DataError(f"{name}: the vocabulary does not have {wanted}; name the one it has with eod=")
        self.kind = "tokenizers"
        self.eod_token = eod or found
        self.eod = vocabulary[self.eod_token]
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._library.get_added_tokens_decoder().values()
        self.special_tokens = tuple(sorted(token.content for token in added if token.special))
        self._table = table
        self._named = self.eod_token != found
        self._pieces: dict[int, bytes] | None = None
        if (table.get("decoder") or {}).get("type") == "ByteLevel":
            self._pieces = {token: _piece_bytes(piece) for piece, token in vocabulary.items()}
        # Only where it changes nothing: our own way of cutting words, and nothing that acts before it.
        self._cuttable = (
            table.get("pre_tokenizer") == json.loads(_untrained().to_str())["pre_tokenizer"]
            and not table.get("normalizer")
            and all(added["special"] for added in table.get("added_tokens") or ())
        )

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self.encode_arrays([text])[0].tolist()
        _utf8(text)
        self._library.encode_special_tokens = False
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        _utf8(text)
        self._library.encode_special_tokens = True
        return self._library.encode(text).ids

    def encode_with_starts(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[int]]:
        _utf8(text)
        self._library.encode_special_tokens = not allow_special
        encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._library.encode_special_tokens = True
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(texts, self._cuttable):
            pieces = [piece for _, piece in group]
            for (i, _), encoding in zip(
                group, self._library.encode_batch_fast(pieces, add_special_tokens=False), strict=True
            ):
                parts[i].append(np.array(encoding.ids, dtype=np.int32))
        return [each[0] if len(each) == 1 else np.concatenate(each) for each in parts]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(each) for each in ids]
        self._check_ids(ids)
        return self._library.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes | None:
        return None if self._pieces is None else self._pieces.get(token, b"")

    def content(self) -> dict:
        return {_FORMAT: 1, "eod": self.eod_token, "tokenizer": self._table} if self._named else self._table


class StreamDecoder:
    """Ids one by one to text that is whole characters at every step; the parts together are `decode` of all the ids.

    >>> stream = tokenizer.stream_decoder()
    >>> for token in tokens:
    ...     print(stream.push(token), end="")
    >>> print(stream.finish())
    """

    _PATIENCE = 8  # ids without a whole character: a character has at most 4 bytes, so these bytes are not UTF-8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._exact = tokenizer.token_bytes(tokenizer.eod) is not None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # ids shown last: some decoders treat the first id of a text differently
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be "". Raises DataError: id out of range."""
        token = int(token)
        self._tokenizer._check_ids([token])
        if self._exact:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._pending.append(token)
        text = self._pending_text()
        if text.endswith("\ufffd") and len(self._pending) < self._PATIENCE:
            return ""
        return self._shown(text)

    def finish(self) -> str:
        """The rest: an incomplete character as U+FFFD, else "". The decoder can then be used again."""
        if self._exact:
            return self._utf8.decode(b"", final=True)
        rest = self._shown(self._pending_text())
        self._context = []
        return rest

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _shown(self, text: str) -> str:
        self._context, self._pending = self._pending or self._context, []
        return text


def train_bpe(texts: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) with PATTERN as pre-tokeniser and EOD as id 0.

    vocab_size: 257 or more (EOD and 256 bytes); a short text gives fewer ids. Any text is decoded to itself. The result
    depends on the texts only, not on their order or the number of threads. Memory: the different words of the texts.
    Raises ConfigError for a smaller vocab_size.
    """
    require(vocab_size >= 257, f"vocab_size must be 257 or more for a byte-level BPE, got {vocab_size}")
    library = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    library.train_from_iterator((piece for text in texts for piece in cut(text)), trainer)
    return JsonTokenizer(json.loads(library.to_str()))


def cut(text: str, size: int = _PIECE) -> Iterator[str]:
    """Pieces of about `size` characters that PATTERN would cut there too, so that encoding them gives the same ids.

    A piece ends after an ASCII letter or digit that is followed by a line end: no match of PATTERN goes across. Text
    without such a place stays whole.
    """
    start = 0
    while len(text) - start > size:
        end = text.find("\n", start + size)
        while end > 0 and not (text[end - 1].isascii() and text[end - 1].isalnum()):
            end = text.find("\n", end + 1)
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(texts: Sequence[str], cuttable: bool) -> Iterator[list[tuple[int, str]]]:
    """(number of the text, piece of it), in groups of a few pieces' size to encode together."""
    group: list[tuple[int, str]] = []
    size = 0
    for i, text in enumerate(texts):
        _utf8(text)
        for piece in cut(text) if cuttable else (text,):
            group.append((i, piece))
            size += len(piece)
            if size >= 4 * _PIECE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _untrained() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    library.decoder = decoders.ByteLevel()
    return library


def _byte_names() -> dict[str, int]:
    """GPT-2's printable name of each byte: itself where it is printable in Latin-1, else a character from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_NAMES = _byte_names()


def _piece_bytes(piece: str) -> bytes:
    """As the library's ByteLevel decoder: a piece that is not all byte names stands for itself (added tokens)."""
    if all(character in BYTE_NAMES for character in piece):
        return bytes(BYTE_NAMES[character] for character in piece)
    return piece.encode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has the lone surrogate {text[error.start]!a} at character {error.start}, which has no UTF-8 form; "
            f"remove it"
        ) from error
