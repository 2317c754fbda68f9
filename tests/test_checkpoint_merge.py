"""One file for a checkpoint and back: the same bits, whatever the layout; damage and wrong input are refused. 5 s."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import megakern as mk
from megakern.cli import main
from megakern.train import checkpoint, checkpoint_merge, checkpoint_plan
from megakern.train.checkpoint import CheckpointError
from megakern.train.checkpoint_merge import merge, split
from megakern.train.files import Files
from tests.checkpoints import ONE, FaultyFiles, blank, damage, same_bits, sample, save_sample

TENSORS = {
    "model.column": (torch.arange(48.0).reshape(8, 6), Shard(0)),
    "model.row": (torch.arange(60.0).reshape(5, 12), Shard(1)),
    "model.half": (torch.arange(35).reshape(7, 5).bfloat16(), Replicate()),
    "model.uneven": (torch.arange(15.0).reshape(5, 3), Shard(0)),
    "model.empty": (torch.zeros(0, 3), Replicate()),
    "model.byte": (torch.arange(9, dtype=torch.uint8), Replicate()),
    "optimizer.exp_avg.column": (-torch.arange(48.0).reshape(8, 6), Shard(0)),
    "optimizer.step": (torch.tensor(17), Replicate()),
}
WHOLE = {name: tensor for name, (tensor, _) in TENSORS.items()}
STATE = {"step": 5, "text": 'é "quoted" \\ {}', "list": [1, 2.5, None]}


def save_over_tp(folder: str) -> None:
    parallel = mk.ParallelContext.create(tp=torch.distributed.get_world_size())
    tensors = {
        name: distribute_tensor(tensor, parallel.mesh["tp"], [placement])
        for name, (tensor, placement) in TENSORS.items()
    }
    checkpoint.save(folder, 5, tensors, STATE, parallel)


def load_over_tp(folder: str) -> dict:
    parallel = mk.ParallelContext.create(tp=torch.distributed.get_world_size())
    into = {
        name: distribute_tensor(torch.zeros_like(tensor), parallel.mesh["tp"], [placement])
        for name, (tensor, placement) in TENSORS.items()
    }
    assert checkpoint.load(checkpoint.newest(folder, parallel), into, parallel) == STATE
    return {name: tensor.full_tensor() for name, tensor in into.items()}


@pytest.fixture
def merged(tmp_path) -> Path:
    checkpoint.save(tmp_path / "ckpt", 5, WHOLE, STATE, ONE)
    merge(tmp_path / "ckpt", tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


@pytest.mark.promise("R11")
def test_of_two_ranks_into_one_file_and_back(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_merge, "CHUNK_BYTES", 50)  # one to four rows at a time
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 100)
    ranks.run(save_over_tp, 2, str(tmp_path / "ckpt"))
    said = merge(tmp_path, tmp_path / "all.safetensors")
    assert said.startswith(f"merged {tmp_path}/ckpt/step-00000005 into") and "8 tensors" in said
    assert same_bits(load_file(tmp_path / "all.safetensors"), WHOLE), "not what the safetensors library reads"
    for count in (1, 2, 3, 8):
        path = split(tmp_path / "all.safetensors", tmp_path / f"{count}", ranks=count)
        assert path == tmp_path / f"{count}" / "step-00000005" and checkpoint.verify(path) == []
        found = checkpoint.read_manifest(path)
        assert found.layout["dp"] == count and found.threads == 1
        assert len({piece.file.split("-part")[0] for e in found.tensors.values() for piece in e.pieces}) == count
        into = blank(WHOLE)
        assert checkpoint.load(path, into, ONE) == STATE
        assert same_bits(into, WHOLE)
    for into in ranks.run(load_over_tp, 2, str(tmp_path / "3")):
        assert same_bits(into, WHOLE)


def test_only_the_model(tmp_path):
    checkpoint.save(tmp_path / "ckpt", 5, WHOLE, STATE, ONE)
    assert main(["ckpt", "merge", str(tmp_path), "--only", "model", "--out", str(tmp_path / "m.safetensors")]) == 0
    model = {name: tensor for name, tensor in WHOLE.items() if name.startswith("model.")}
    assert same_bits(load_file(tmp_path / "m.safetensors"), model)
    into = blank(model)
    assert checkpoint.load(split(tmp_path / "m.safetensors", tmp_path / "back"), into, ONE, only="model.") == STATE
    assert same_bits(into, model)
    save_sample(tmp_path / "other", 1, seed=1)
    checkpoint.save(tmp_path / "third", 1, {"data.order": torch.ones(2)}, {}, ONE)
    with pytest.raises(CheckpointError, match="has no tensors of 'model'; it has those of data"):
        merge(tmp_path / "third", tmp_path / "x.safetensors", only="model")


def test_split_leaves_other_checkpoints_alone(merged, tmp_path):
    for step in (1, 2, 3):
        save_sample(tmp_path / "many", step, seed=step, keep=9)
    split(merged, tmp_path / "many")
    assert sorted(path.name for path in (tmp_path / "many").glob("step-*")) == [
        f"step-0000000{n}" for n in (1, 2, 3, 5)
    ]
    with pytest.raises(CheckpointError, match="step-00000005 exists already, and is not overwritten"):
        split(merged, tmp_path / "many")


def test_the_parts_are_aligned(merged):
    data = merged.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in WHOLE.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_no_chunk_is_larger_than_its_limit(tmp_path, monkeypatch):
    """And no more than one is held: the writer asks for the next when it has written the last."""
    monkeypatch.setattr(checkpoint_merge, "CHUNK_BYTES", 4096)
    big = {"model.big": torch.randn(512, 64), "model.wide": torch.randn(2, 3000)}
    checkpoint.save(tmp_path / "ckpt", 5, big, STATE, ONE)
    sizes = []

    class Watching(Files):
        def write(self, descriptor, data):
            sizes.append(data.nbytes)
            return super().write(descriptor, data)

    merge(tmp_path, tmp_path / "all.safetensors", files=Watching())
    assert max(sizes[1:]) == 12_000 and len(sizes) == 1 + 32 + 2  # a row of 3000; 16 rows of 64
    assert same_bits(load_file(tmp_path / "all.safetensors"), big)


@pytest.mark.promise("R4")
def test_each_flipped_bit_of_a_merged_file_is_found(merged, tmp_path, trials):
    good, chance = merged.read_bytes(), random.Random(2)
    for _ in range(150):
        trials()
        bad = bytearray(good)
        position = chance.randrange(len(good))
        bad[position] ^= 1 << chance.randrange(8)
        merged.write_bytes(bad)
        try:
            path = split(merged, tmp_path / "back")
        except CheckpointError as error:
            assert str(merged) in str(error)
            assert not (tmp_path / "back").exists()
        else:
            # What is not found changes nothing: it is in the word "pt".
            into = blank(WHOLE)
            assert checkpoint.load(path, into, ONE) == STATE and same_bits(into, WHOLE)
            for part in sorted(path.parent.rglob("*"), reverse=True):
                part.unlink() if part.is_file() else part.rmdir()
            path.parent.rmdir()


def test_a_damaged_tensor_is_named(merged, tmp_path):
    damage(merged)  # its last byte is that of the uint8 tensor
    with pytest.raises(CheckpointError, match=r"all\.safetensors is damaged, nothing was made: model\.byte$"):
        split(merged, tmp_path / "back")


def test_what_is_not_ours_is_refused(merged, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.ones(2)}, plain)
    with pytest.raises(CheckpointError, match="was not made by megakern ckpt merge: its metadata has no 'megakern'"):
        split(plain, tmp_path / "back")
    plain.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        split(plain, tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"nothing: there is no such file; name the \.safetensors file that `meg"):
        split(tmp_path / "nothing", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"is a folder; name the \.safetensors file"):
        split(tmp_path, tmp_path / "back")
    with pytest.raises(CheckpointError, match="--ranks must be from 1 to 100000, got 0"):
        split(merged, tmp_path / "back", ranks=0)
    # A header that has more tensors than its manifest, and one with another shape.
    from safetensors import safe_open

    with safe_open(merged, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(WHOLE | {"model.more": torch.ones(1)}, plain, metadata)
    with pytest.raises(CheckpointError, match=r"is damaged: its header and its manifest differ in model\.more"):
        split(plain, tmp_path / "back")
    save_file(WHOLE | {"model.row": torch.ones(12, 5)}, plain, metadata)
    with pytest.raises(CheckpointError, match=r"is damaged: model\.row is \('F32', \(12, 5\)\), its manifest says"):
        split(plain, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_checkpoint_is_not_merged(tmp_path):
    path = save_sample(tmp_path, 1, seed=1)
    damage(next(path.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged, nothing was merged:\n  rank-00000-part-000"):
        merge(path, tmp_path / "all.safetensors")
    with pytest.raises(CheckpointError, match="no sound checkpoint in"):
        merge(tmp_path, tmp_path / "all.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_nothing_is_overwritten(merged, tmp_path):
    before = merged.read_bytes()
    with pytest.raises(CheckpointError, match=r"all\.safetensors exists already, and is not overwritten; name another"):
        merge(tmp_path / "ckpt", merged)
    assert merged.read_bytes() == before


def test_a_failed_merge_leaves_nothing(tmp_path):
    save_sample(tmp_path / "ckpt", 1, seed=1)
    counter = FaultyFiles(-1, "error")
    merge(tmp_path, tmp_path / "counted.safetensors", files=counter)
    for kind in ("error", "torn", "lie"):
        for k, name in enumerate(counter.names):
            if kind != "error" and name != "write":
                continue
            with pytest.raises(CheckpointError, match=r"cannot write .*all\.safetensors"):
                merge(tmp_path, tmp_path / "all.safetensors", files=FaultyFiles(k, kind))
            complete = tmp_path / "all.safetensors"
            assert not list(tmp_path.glob("*.tmp-*")) and complete.exists() == (name == "sync_folder")
            complete.unlink(missing_ok=True)

    class NoSpace(Files):
        def free_bytes(self, path):
            return 1000

    with pytest.raises(CheckpointError, match=r"no space in .*: 0\.0 MB needed, 0\.0 MB free"):
        merge(tmp_path, tmp_path / "all.safetensors", files=NoSpace())


def test_the_command(tmp_path, capsys):
    save_sample(tmp_path / "ckpt", 1, seed=1)
    file, back = str(tmp_path / "all.safetensors"), str(tmp_path / "back")
    assert main(["ckpt", "merge", str(tmp_path), "--out", file]) == 0
    assert main(["ckpt", "split", file, "--out", back, "--ranks", "2"]) == 0
    assert capsys.readouterr().out.endswith(f"made {back}/step-00000001\n")
    assert main(["ckpt", "verify", back]) == 0
    into = blank(sample(0))
    checkpoint.load(Path(back) / "step-00000001", into, ONE)
    assert same_bits(into, sample(1))
    for words, message in (
        (["merge", str(tmp_path)], "ckpt merge: name what to make with --out"),
        (["ls", str(tmp_path), "--out", file], "ckpt ls takes no --out; it is for merge and split"),
        (["split", file, "--out", back, "--only", "model"], "ckpt split takes no --only; it is for merge"),
        (["merge", str(tmp_path), "--out", back, "--ranks", "2"], "ckpt merge takes no --ranks; it is for split"),
    ):
        assert main(["ckpt", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["ckpt", "merge", str(tmp_path), "--out", file]) == 1
    assert "exists already" in capsys.readouterr().err
