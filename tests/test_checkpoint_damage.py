"""Checkpoints that were changed after saving, by accident or on purpose: all are found and named. About 4 s."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from megakern.train import checkpoint, checkpoint_plan, manifest
from megakern.train.checkpoint import CheckpointError
from tests.checkpoints import loaded_seed, sample, save_sample

NAME = "manifest.json"


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """The newer of two checkpoints, each in three shard files."""
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 300)
    save_sample(tmp_path, 1, seed=1)
    return save_sample(tmp_path, 2, seed=2)


def what_is_at(path: Path, position: int) -> str:
    """The tensor whose bytes are at `position` of a safetensors file, or "header". Reads the format by itself."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    if position < start:
        return "header"
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if first <= position - start < last:
                return name
    raise AssertionError(f"{position} is in no tensor")


def refused(path: Path) -> str:
    """`verify` finds fault with `path`, and `load` refuses it. Returns what `verify` says."""
    problems = checkpoint.verify(path)
    assert problems
    with pytest.raises(CheckpointError):
        loaded_seed(path)
    return "\n".join(problems)


@pytest.mark.promise("R4")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(saved, trials, count):
    chance = random.Random(count)
    files = sorted(saved.iterdir())
    assert len(files) == 4
    for number in range(count):
        trials()
        path = files[number % 4]
        good = path.read_bytes()
        position, bit = chance.randrange(len(good)), chance.randrange(8)
        bad = bytearray(good)
        bad[position] ^= 1 << bit
        path.write_bytes(bad)
        text = refused(saved)
        assert path.name in text, f"byte {position} bit {bit}: {text}"
        assert not any(other.name in text for other in files if other != path and other.name != NAME), text
        if path.name != NAME:
            where = what_is_at_good(good, path, position)
            assert text.count("rank-") == 1, f"byte {position} bit {bit} in {where}: {text}"
            if where != "header":
                assert [name for name in sample(0) if name in text] == [where], f"byte {position} bit {bit}: {text}"
        if number % 20 == 0:
            assert loaded_seed(checkpoint.newest(saved.parent)) == 1
        path.write_bytes(good)
    assert loaded_seed(checkpoint.newest(saved.parent)) == 2


def what_is_at_good(good: bytes, path: Path, position: int) -> str:
    bad = path.read_bytes()
    path.write_bytes(good)
    where = what_is_at(path, position)
    path.write_bytes(bad)
    return where


@pytest.mark.promise("R4")
def test_every_bit_of_the_manifest(saved, trials):
    path = saved / NAME
    good = path.read_bytes()
    for position in range(0, len(good)):
        for bit in (0, 5) if position % 8 else range(8):  # 5: small and capital letters
            trials()
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            with pytest.raises(CheckpointError, match="x is damaged"):
                manifest.parse(bytes(bad), "x")


@pytest.mark.promise("R5")
def test_truncated_lengthened_and_empty_files(saved, trials):
    chance = random.Random(3)
    for path in sorted(saved.iterdir()):
        good = path.read_bytes()
        cuts = [0, 1, 7, 8, len(good) - 1] + [chance.randrange(len(good)) for _ in range(25)]
        for bad in [good[:cut] for cut in cuts] + [good + b"\0", good + good, bytes(len(good))]:
            trials()
            path.write_bytes(bad)
            assert path.name in refused(saved)
        path.write_bytes(good)
    assert checkpoint.verify(saved) == []


@pytest.mark.promise("R5")
def test_missing_files(saved, trials):
    for path in sorted(saved.iterdir()):
        trials()
        good = path.read_bytes()
        path.unlink()
        assert f"{path.name}: missing" in refused(saved) or f"{NAME} is missing" in refused(saved)
        path.write_bytes(good)
    assert loaded_seed(saved) == 2


@pytest.mark.promise("R5")
@pytest.mark.parametrize("swapped", [(0, 1), (0, 2), (1, 2)])
def test_two_shards_swapped(saved, swapped):
    shards = sorted(saved.glob("*.safetensors"))
    first, second = (shards[index] for index in swapped)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    text = refused(saved)
    assert first.name in text and second.name in text


@pytest.mark.promise("R5")
def test_a_shard_or_manifest_of_another_step(saved, trials):
    other = saved.parent / "step-00000001"
    for path in sorted(saved.iterdir()):
        trials()
        good = path.read_bytes()
        path.write_bytes((other / path.name).read_bytes())
        text = refused(saved)
        if path.name == NAME:
            assert "is of step 1, but its folder is called step-00000002" in text
        else:
            assert f"{path.name}: its SHA-256 is not the one in the manifest; damaged: " in text
        path.write_bytes(good)
    shutil.copytree(saved, saved.parent / "copy")
    shutil.copy(other / NAME, saved.parent / "copy" / NAME)
    assert refused(saved.parent / "copy").count("SHA-256") == 3


@pytest.mark.promise("R5")
def test_links_are_refused(saved):
    outside = saved.parent / "outside"
    outside.mkdir()
    for path in sorted(saved.iterdir()):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
        assert "not a plain file; a checkpoint holds no links" in refused(saved)
        path.unlink()
        (outside / path.name).rename(path)
    assert loaded_seed(saved) == 2


def test_a_file_that_cannot_be_read_is_named(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.unlink()
    shard.mkdir()
    assert f"{shard.name}: not a plain file" in refused(saved)
    (saved / NAME).unlink()
    (saved / NAME).mkdir()
    assert "manifest.json is not a plain file" in refused(saved)


@pytest.mark.promise("R5")
def test_files_of_another_run_at_the_same_step(saved, trials):
    """The other run's files have the same names, sizes and step: only the hashes tell."""
    other = save_sample(saved.parent / "other", 2, seed=9)
    for path in sorted(saved.iterdir()):
        trials()
        good = path.read_bytes()
        path.write_bytes((other / path.name).read_bytes())
        assert path.name == NAME or path.stat().st_size == len(good)
        assert "its SHA-256 is not the one in the manifest; damaged: " in refused(saved)
        path.write_bytes(good)
    assert checkpoint.verify(saved) == []
