"""Token files against golden bytes, and against damage of every kind. No device needed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakern.data.files import DataError
from megakern.data.indexed import IndexedDataset, IndexedWriter, dtype_for

DOCUMENTS = [[1, 2, 65535], [], [7]]

# The pair of DOCUMENTS in uint16, written out by hand from the table of offsets.
GOLDEN_BIN = bytes.fromhex("0100 0200 ffff 0700")
GOLDEN_IDX = bytes.fromhex(
    "4d4d4944494458 0000"  # 0: MMIDIDX
    "0100000000000000"  # 9: version
    "08"  # 17: uint16
    "0300000000000000"  # 18: three sequences
    "0400000000000000"  # 26: four document indices
    "03000000 00000000 01000000"  # 34: lengths
    "0000000000000000 0600000000000000 0600000000000000"  # 46: pointers in bytes
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # 70: documents
)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def put(folder, idx=GOLDEN_IDX, bin=GOLDEN_BIN):
    (folder / "x.idx").write_bytes(idx)
    (folder / "x.bin").write_bytes(bin)
    return folder / "x"


def changed(offset, form, value):
    head = bytearray(GOLDEN_IDX)
    struct.pack_into(form, head, offset, value)
    return bytes(head)


def test_writes_the_golden_bytes(tmp_path):
    write(tmp_path / "x")
    assert (tmp_path / "x.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN_IDX
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_reads_the_golden_bytes(tmp_path):
    dataset = IndexedDataset(put(tmp_path))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset[-1].tolist() == [7] and dataset.token_count == 4 and dataset.dtype == np.uint16
    assert dataset.lengths.tolist() == [3, 0, 1] and dataset.pointers.tolist() == [0, 6, 6]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3] and dataset.tokens.tolist() == [1, 2, 65535, 7]
    with pytest.raises(IndexError, match="sequence 3 is out of range, there are 3"):
        dataset[3]
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 1


@pytest.mark.parametrize("code, dtype", [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_integer_type(tmp_path, code, dtype):
    rows = [[1, 2, 3], [100]]
    write(tmp_path / "x", rows, np.dtype(dtype))
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert (tmp_path / "x.bin").read_bytes() == np.array([1, 2, 3, 100], dtype).tobytes()
    assert [row.tolist() for row in IndexedDataset(tmp_path / "x.bin")] == rows


def test_sequences_that_are_parts_of_documents(tmp_path):
    """Megatron can keep sentences apart: two sequences in the first document, none in the second."""
    idx = GOLDEN_IDX[:70] + struct.pack("<4q", 0, 2, 2, 3)
    assert IndexedDataset(put(tmp_path, idx)).document_indices.tolist() == [0, 2, 2, 3]


def test_dtype_for_the_vocabulary():
    assert [dtype_for(size) for size in (257, 65499, 65500, 200_000)] == [np.uint16, np.uint16, np.int32, np.int32]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=10).filter(any))
def test_round_trip(tmp_path, rows):
    write(tmp_path / "x", rows)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "x")] == rows


def damage(data, content):
    """Flip bits, cut, extend, or overwrite a field with a number that hurts."""
    content = bytearray(content)
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "number"]))
    if kind == "cut":
        return bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if kind == "extend":
        return bytes(content) + data.draw(st.binary(min_size=1, max_size=40))
    if kind == "number":
        offset = data.draw(st.integers(9, len(content) - 8))
        struct.pack_into("<q", content, offset, data.draw(st.sampled_from([-1, 2**31, 2**62, -(2**63), 2**63 - 1, 5])))
        return bytes(content)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(content)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_is_refused_or_equal(tmp_path, data):
    """Token values stay below 128, where the types of one size agree: only a checksum could tell them apart."""
    rows = [[1, 2, 100], [], [7], [5, 6]]
    write(tmp_path / "good", rows)
    prefix = put(tmp_path, damage(data, (tmp_path / "good.idx").read_bytes()), (tmp_path / "good.bin").read_bytes())
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        assert "x.idx" in str(error) or "x.bin" in str(error)
    else:
        assert [row.tolist() for row in dataset] == rows


LEGACY = b"TNTIDX\x00\x00" + struct.pack("<5q", 1, 4, 4, 0, 0)


@pytest.mark.parametrize(
    "idx, message",
    [
        (b"", r"x\.idx: not a Megatron index, it must start with b'MMIDIDX"),
        (b"PK\x03\x04" * 20, r"not a Megatron index.* got b'PK"),
        (GOLDEN_IDX[:30], "truncated, the header has 34 bytes and the file 30"),
        (changed(9, "<Q", 2), "version must be 1, got 2"),
        (changed(17, "<B", 6), "dtype code 6 is a floating point type"),
        (changed(17, "<B", 7), "dtype code 7 is a floating point type"),
        (changed(17, "<B", 9), "dtype code must be one of 1, 2, 3, 4, 5, 8, got 9"),
        (changed(18, "<Q", 2**61), "truncated, 2,305,843,009,213,693,952 sequences"),
        (changed(26, "<Q", 2**64 - 1), "18,446,744,073,709,551,615 document indices need"),
        (GOLDEN_IDX[:-1], r"truncated, 3 sequences and 4 document indices need 102 bytes, the file has 101"),
        (GOLDEN_IDX + bytes(3), r"a multimodal index \(3 sequence modes at its end\)"),
        (GOLDEN_IDX + bytes(4), "4 bytes too many at the end, expected 102, got 106"),
        (changed(34, "<i", -3), "sequence 0 has the negative length -3"),
        (changed(46 + 8, "<q", 4), "sequence 1 must start at byte 6 of .bin .*, its pointer is 4"),
        (changed(46, "<q", -8), "sequence 0 must start at byte 0 .* its pointer is -8"),
        (changed(42, "<i", 2), r"x\.bin: truncated, the index describes 10 bytes, the file has 8"),
        (changed(42, "<i", 0), r"x\.bin: too long, the index describes 6 bytes, the file has 8"),
        (changed(70, "<q", 1), "document indices must start with 0, got 1"),
        (changed(78, "<q", 3), "document index 2 must be 3 or more, got 2"),
        (changed(94, "<q", 4), "document indices must end with 3, the sequences, got 4"),
        (changed(26, "<Q", 0)[:70], "document indices must start with 0, got none"),
        (LEGACY, "old TNTIDX index, which cannot be memory-mapped; make it again with --dataset-impl mmap"),
    ],
)
def test_each_kind_of_damage_is_named(tmp_path, idx, message):
    with pytest.raises(DataError, match=message):
        IndexedDataset(put(tmp_path, idx))


def test_missing_empty_and_truncated_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.idx: there is no such file; `megakern prepare` writes both"):
        IndexedDataset(tmp_path / "x")
    put(tmp_path, bin=b"")
    with pytest.raises(DataError, match=r"x\.bin: the file is empty"):
        IndexedDataset(tmp_path / "x")
    put(tmp_path, bin=GOLDEN_BIN[:-1])
    with pytest.raises(DataError, match=r"x\.bin: truncated, the index describes 8 bytes, the file has 7"):
        IndexedDataset(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match=r"x\.bin: there is no such file"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(
    "document, message",
    [
        ([65536], r"token ids must be from 0 to 65535 for uint16, got 65536 to 65536; choose the dtype"),
        ([3, -1], "got -1 to 3"),
        ([0.5], "a document must be a row of integers, got 1-d float64"),
        ([[1, 2]], "a document must be a row of integers, got 2-d int64"),
        ([2**70], "a document must be a row of integers, got 1-d object"),
    ],
)
def test_wrong_documents_are_refused_and_leave_nothing(tmp_path, document, message):
    with pytest.raises(DataError, match=message), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.add_document(document)
    assert os.listdir(tmp_path) == []


def test_writer_refuses_floats_and_an_empty_pair(tmp_path):
    with pytest.raises(DataError, match=r"tokens must be one of uint8, .*, got float32"):
        IndexedWriter(tmp_path / "x", np.float32)
    with pytest.raises(DataError, match="no tokens were added"), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([])
    assert os.listdir(tmp_path) == []


def test_too_long_a_document_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match="a document has 2,147,483,648 tokens"),
        IndexedWriter(tmp_path / "x", np.uint8) as w,
    ):
        # no memory behind it: one element, repeated
        w.add_document(np.broadcast_to(np.uint8(1), (2**31,)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", range(12))
def test_a_crash_at_any_file_operation_never_shows_a_mixed_pair(tmp_path, monkeypatch, call):
    """An old pair is replaced, and the call-th operation fails: the index beside .bin is its own, or there is none."""
    write(tmp_path / "x", [[9, 9, 9, 9, 9]])
    count = iter(range(100))

    def failing(real):
        def operation(*arguments, **keywords):
            if next(count) == call:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        return operation

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    try:
        write(tmp_path / "x")
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert finished == (call >= next(count))
    if (tmp_path / "x.idx").exists():
        assert [row.tolist() for row in IndexedDataset(tmp_path / "x")] in ([[9, 9, 9, 9, 9]], DOCUMENTS)


def test_disk_full_is_named_and_leaves_nothing(tmp_path):
    """A limit on the size of files gives the process a real EFBIG."""
    code = (
        "import resource, sys, numpy as np\n"
        "from megakern.data.indexed import IndexedWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "with IndexedWriter(sys.argv[1], np.uint16) as writer:\n"
        "    for _ in range(100):\n"
        "        writer.add_document(np.ones(1000, np.uint16))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert "DiskFull" in done.stderr and "x.bin: File too large after" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []
