"""Token files in Megatron-LM's format, byte for byte: PREFIX.bin holds the tokens, PREFIX.idx says where documents are.

`.bin` is the tokens one after the other, with no header. `.idx`, all little-endian:

    offset     bytes  content
    0          9      b"MMIDIDX\\x00\\x00"
    9          8      u64 version, 1
    17         1      u8 dtype code (see DTYPES)
    18         8      u64 S, sequences
    26         8      u64 D, length of document_indices = documents + 1
    34         4 S    int32 sequence lengths in tokens
    34 + 4 S   8 S    int64 sequence pointers: byte offsets into .bin, the running sum of length x itemsize
    34 + 12 S  8 D    int64 document indices: 0, then for each document the number of sequences up to its end

Source: megatron/core/datasets/indexed_dataset.py. Where Megatron asserts or trusts, this reader raises DataError.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megakern.data.files import DataError, disk_full_named, flush_folder, flush_to_disk

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Code to type. 6 and 7 are the floats, and mean opposite sizes in Megatron-LM and GPT-NeoX."""

_HEADER = struct.Struct("<9sQBQQ")  # 34 bytes, no padding
_LONGEST = 2**31 - 1  # a length is an int32


def dtype_for(vocab_size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """The type Megatron chooses for a vocabulary: uint16 below 65500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _pair(prefix: str | os.PathLike) -> tuple[Path, Path]:
    prefix = Path(prefix)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx. The names appear when `finalize` is done, `.idx` last; until then no pair.

    As a context manager it finalizes at the end of the block, or removes its temporary files after an exception.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: type | np.dtype) -> None:
        """dtype: one of DTYPES. Raises DataError for another type."""
        self.bin_path, self.idx_path = _pair(prefix)
        self._dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPES.items() if self._dtype == np.dtype(known)]
        if not codes:
            known = ", ".join(np.dtype(each).name for each in DTYPES.values())
            raise DataError(f"{self.bin_path}: tokens must be one of {known}, got {self._dtype.name}")
        self._code = codes[0]
        self._range = np.iinfo(self._dtype)
        self._lengths = array("i")
        self.token_count = 0
        nonce = secrets.token_hex(4)
        self._temporary = [path.with_name(f".{path.name}.tmp-{nonce}") for path in (self.bin_path, self.idx_path)]
        self._file = open(self._temporary[0], "wb")  # noqa: SIM115 - closed by finalize or abort

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document, of one sequence. tokens (n,), integers that fit the dtype; n may be 0.

        Raises DataError: not a row of integers, an id outside the dtype's range, too long for int32, disk full.
        """
        tokens = np.asarray(tokens, dtype=np.int64 if len(tokens) == 0 else None)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{self.bin_path}: a document must be a row of integers, got {tokens.ndim}-d {tokens.dtype}"
            )
        if len(tokens) > _LONGEST:
            raise DataError(
                f"{self.bin_path}: a document has {len(tokens):,} tokens, the format allows 2^31 - 1; cut it"
            )
        if len(tokens) and (tokens.min() < self._range.min or tokens.max() > self._range.max):
            raise DataError(
                f"{self.bin_path}: token ids must be from {self._range.min} to {self._range.max} for "
                f"{self._dtype.name}, got {tokens.min()} to {tokens.max()}; choose the dtype with dtype_for(vocab_size)"
            )
        with disk_full_named(self.bin_path, self.token_count * self._dtype.itemsize):
            self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype.newbyteorder("<")).data)
        self._lengths.append(len(tokens))
        self.token_count += len(tokens)

    def finalize(self) -> None:
        """Write the index and give both files their names. Raises DataError: no tokens were added, disk full."""
        try:
            if not self.token_count:
                raise DataError(f"{self.bin_path}: no tokens were added, and an empty file cannot be read back")
            lengths = np.frombuffer(self._lengths, dtype=np.int32)
            ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            header = _HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1)
            with disk_full_named(self.bin_path, self.token_count * self._dtype.itemsize), self._file:
                flush_to_disk(self._file)
            with disk_full_named(self.idx_path, 0), open(self._temporary[1], "wb") as file:
                file.write(header)
                file.write(lengths.astype("<i4").data)
                file.write((ends - lengths.astype(np.int64) * self._dtype.itemsize).astype("<i8").data)
                file.write(np.arange(len(lengths) + 1, dtype="<i8").data)
                flush_to_disk(file)
            # An index must never stand beside another pair's tokens: the old one goes first, the new one comes last.
            self.idx_path.unlink(missing_ok=True)
            os.replace(self._temporary[0], self.bin_path)
            os.replace(self._temporary[1], self.idx_path)
        except BaseException:
            self.abort()
            raise
        flush_folder(self.bin_path.parent)

    def abort(self) -> None:
        """Remove the temporary files. Nothing else is touched."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)


class IndexedDataset:
    """The documents of PREFIX.bin and PREFIX.idx, memory-mapped.

    `dataset[i]` is sequence i, a read-only array; `len(dataset)` the number of sequences (one a document, unless the
    writer kept sentences apart). `lengths` (S,) int32, `pointers` (S,) int64 bytes, `document_indices` (D,) int64,
    `tokens` (token_count,) all tokens in file order.
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        """Open and check both files. Raises DataError: missing, truncated, inconsistent, or of a kind we cannot use."""
        self.bin_path, self.idx_path = _pair(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; `megakern prepare` writes both .bin and .idx")
        self.dtype, sequences, documents = self._read_header()
        index = np.memmap(self.idx_path, np.uint8, "r")

        def column(dtype: str, count: int, offset: int) -> np.ndarray:
            return np.frombuffer(index, dtype, count, offset)

        self.lengths = column("<i4", sequences, _HEADER.size)
        self.pointers = column("<i8", sequences, _HEADER.size + 4 * sequences)
        self.document_indices = column("<i8", documents, _HEADER.size + 12 * sequences)
        self.token_count = self._check_sequences()
        self._check_documents()
        self.tokens = np.memmap(self.bin_path, self.dtype.newbyteorder("<"), "r", shape=self.token_count)
        self.tokens = self.tokens.view(np.ndarray)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.bin_path}: sequence {i} is out of range, there are {len(self)}")
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """dtype, S and D. S and D are bounded by the size of the file, so that allocations by them are safe."""
        path = self.idx_path
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
        if head.startswith(LEGACY_MAGIC):
            raise DataError(
                f"{path}: this is the old TNTIDX index, which cannot be memory-mapped; "
                f"make it again with --dataset-impl mmap, or prepare the text with megakern"
            )
        if not head.startswith(MAGIC):
            raise DataError(f"{path}: not a Megatron index, it must start with {MAGIC!r}, got {head[:9]!r}")
        if size < _HEADER.size:
            raise DataError(f"{path}: truncated, the header has {_HEADER.size} bytes and the file {size}")
        _, version, code, sequences, documents = _HEADER.unpack(head)
        if version != VERSION:
            raise DataError(f"{path}: version must be {VERSION}, got {version}")
        if code in (6, 7):
            raise DataError(f"{path}: dtype code {code} is a floating point type, and tokens are integers")
        if code not in DTYPES:
            raise DataError(f"{path}: dtype code must be one of {', '.join(map(str, DTYPES))}, got {code}")
        wanted = _HEADER.size + 12 * sequences + 8 * documents
        if wanted > size:
            raise DataError(
                f"{path}: truncated, {sequences:,} sequences and {documents:,} document indices need {wanted:,} bytes, "
                f"the file has {size:,}"
            )
        if size == wanted + sequences and sequences:
            raise DataError(
                f"{path}: a multimodal index ({sequences:,} sequence modes at its end); only text can be used"
            )
        if size > wanted:
            raise DataError(f"{path}: {size - wanted:,} bytes too many at the end, expected {wanted:,}, got {size:,}")
        return np.dtype(DTYPES[code]), sequences, documents

    def _check_sequences(self) -> int:
        """The token count. Lengths, pointers and .bin must agree exactly: any doubt means that the pair is mixed up."""
        path, itemsize = self.idx_path, self.dtype.itemsize
        size = self.bin_path.stat().st_size
        if not size:
            raise DataError(f"{self.bin_path}: the file is empty; prepare the data again")
        if len(self.lengths) and self.lengths.min() < 0:
            worst = int(self.lengths.argmin())
            raise DataError(f"{path}: sequence {worst} has the negative length {self.lengths[worst]}")
        ends = np.cumsum(self.lengths, dtype=np.int64) * itemsize  # 2^34 bytes a sequence at most
        starts = ends - self.lengths.astype(np.int64) * itemsize
        wrong = np.flatnonzero(self.pointers != starts)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{path}: sequence {i} must start at byte {starts[i]} of .bin (the end of the one before), "
                f"its pointer is {self.pointers[i]}"
            )
        total = int(ends[-1]) if len(ends) else 0
        if total != size:
            state = "truncated" if size < total else "too long"
            raise DataError(
                f"{self.bin_path}: {state}, the index describes {total:,} bytes, the file has {size:,}; "
                f".bin and .idx must come from the same run"
            )
        return total // itemsize

    def _check_documents(self) -> None:
        path, indices, sequences = self.idx_path, self.document_indices, len(self.lengths)
        if not len(indices) or indices[0] != 0:
            raise DataError(f"{path}: document indices must start with 0, got {indices[0] if len(indices) else 'none'}")
        falls = np.flatnonzero(indices[1:] < indices[:-1])
        if len(falls):
            i = int(falls[0]) + 1
            raise DataError(f"{path}: document index {i} must be {indices[i - 1]} or more, got {indices[i]}")
        if indices[-1] != sequences:
            raise DataError(f"{path}: document indices must end with {sequences}, the sequences, got {indices[-1]}")
