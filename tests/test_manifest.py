"""Prepared folders that were changed after they were made. No device needed."""

from __future__ import annotations

import shutil

import pytest

from megakern.data.files import DataError
from megakern.data.manifest import Manifest, PreparedData
from megakern.data.tokenizer import Tokenizer, train_bpe


@pytest.fixture
def prepared(tiny_data, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_data, tmp_path / "data")


def test_opening_notices_a_changed_folder(prepared, tmp_path):
    def attack(message, change):
        shutil.copytree(prepared, tmp_path / "bad", dirs_exist_ok=True)
        change(tmp_path / "bad")
        with pytest.raises(DataError, match=message):
            PreparedData(tmp_path / "bad")

    def edit(folder, old, new):
        path = folder / "manifest.json"
        assert path.read_text().count(old)
        path.write_text(path.read_text().replace(old, new, 1))

    attack(r"train\.idx: the manifest says .* bytes, the file has 0", lambda f: (f / "train.idx").write_bytes(b""))
    attack(r"train\.bin: there is no such file, and the manifest lists it", lambda f: (f / "train.bin").unlink())
    other = train_bpe(["x"], 257)
    attack(
        r"tokenizer\.json: not the tokenizer the data was made with, its hash is [0-9a-f]{16} and the manifest says",
        lambda f: other.save(f / "tokenizer.json"),
    )
    attack(r"tokenizer\.json: cannot read the tokenizer", lambda f: (f / "tokenizer.json").unlink())
    attack(r"train\.idx: \(dtype, documents, tokens\) must be", lambda f: edit(f, '"documents": ', '"documents": 1'))
    attack(r"manifest\.json: schema must be 1, got 9", lambda f: edit(f, '"schema": 1', '"schema": 9'))
    attack(r"manifest\.json: schema must be 1, got True", lambda f: edit(f, '"schema": 1', '"schema": true'))
    attack(r"manifest\.json: schema must be 1, got 1\.0", lambda f: edit(f, '"schema": 1', '"schema": 1.0'))
    attack(r"manifest\.json: schema must be 1, got 'list'", lambda f: (f / "manifest.json").write_text("[]"))
    attack(r"manifest\.json: unknown key 'dtyp'; did you mean 'dtype'", lambda f: edit(f, '"dtype"', '"dtyp"'))
    attack(r"manifest\.json: not JSON", lambda f: (f / "manifest.json").write_text("{"))
    attack(r"manifest\.json: .* or it did not finish", lambda f: (f / "manifest.json").unlink())


def test_verify_finds_one_flipped_bit(prepared):
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        content = bytearray((prepared / name).read_bytes())
        content[-1] ^= 1
        original = bytes(content[:-1]) + bytes([content[-1] ^ 1])
        (prepared / name).write_bytes(content)
        if name.endswith(".bin"):  # the index is checked on opening
            with pytest.raises(DataError, match=rf"{name}: damaged, the SHA-256 is not the manifest's"):
                PreparedData(prepared).verify()
        else:
            with pytest.raises(DataError, match=name):
                PreparedData(prepared)
        (prepared / name).write_bytes(original)
    PreparedData(prepared).verify()


def test_manifest_round_trip(prepared):
    manifest = Manifest.load(prepared / "manifest.json")
    assert manifest.content() == (prepared / "manifest.json").read_bytes()
    assert manifest.tokenizer.sha256 == Tokenizer.load("bytes").sha256 and manifest.options.exclude == ()
