"""Checkpoints in one process: bits come back, what does not fit is listed, the newest sound one is found. About 3 s."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from megakern.train import checkpoint, checkpoint_plan
from megakern.train.checkpoint import CheckpointError, NoCheckpointError
from megakern.train.files import Files
from megakern.train.manifest import DTYPES
from tests.checkpoints import ONE, blank, damage, loaded_seed, same_bits, sample, save_sample


def every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        for label, shape in {"matrix": (5, 3), "empty": (0, 4), "scalar": ()}.items():
            bits = torch.randint(-9, 9, shape, generator=generator)
            tensors[f"{label}.{name}"] = (bits > 0) if dtype == torch.bool else bits.abs().to(dtype)
    tensors["view"] = torch.randn(4, 6, generator=generator).t()
    tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors["negative_nan"] = torch.tensor([-4194303, 2143289345], dtype=torch.int32).view(torch.float32)
    return tensors


def test_round_trip_keeps_each_bit_of_each_dtype(tmp_path):
    tensors, state = (
        every_kind(),
        {"step": 3, "pi": 3.141592653589793, "big": 2**70, "nested": {"a": [1, None, "é\ud800"]}},
    )
    path = checkpoint.save(tmp_path / "a folder é", 3, tensors, state, ONE)
    into = blank(tensors)
    into["view"] = torch.zeros(4, 6).t()
    assert checkpoint.load(path, into, ONE) == state
    assert same_bits(into, tensors)
    assert checkpoint.verify(path) == []


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    path = save_sample(tmp_path, 1, seed=1)
    (shard,) = path.glob("*.safetensors")
    assert same_bits(load_file(shard), sample(1))


def test_parameters_are_filled_in_place(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model.w": torch.ones(3)}, {}, ONE)
    parameter = torch.nn.Parameter(torch.zeros(3))
    memory = parameter.data_ptr()
    checkpoint.load(path, {"model.w": parameter}, ONE)
    assert parameter.requires_grad and parameter.data_ptr() == memory and parameter.tolist() == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in sample(1).items()}
    into = blank(tensors)
    checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}, ONE), into, ONE)
    assert into["model.w"].is_cuda and same_bits({name: tensor.cpu() for name, tensor in into.items()}, sample(1))


def test_tied_tensors_are_saved_under_both_names(tmp_path):
    weight = torch.randn(4, 4)
    path = checkpoint.save(tmp_path, 1, {"model.a": weight, "model.b": weight, "model.c": weight[1:3]}, {}, ONE)
    into = {"model.a": torch.zeros(4, 4), "model.b": torch.zeros(4, 4), "model.c": torch.zeros(2, 4)}
    checkpoint.load(path, into, ONE)
    assert same_bits(into, {"model.a": weight, "model.b": weight, "model.c": weight[1:3]})


def test_shards_are_cut_at_part_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 300)
    path = save_sample(tmp_path, 1, seed=4)
    sizes = [sum(p.numel() * p.element_size() for p in parts) for parts in held_by_file(path)]
    assert len(sizes) == 3 and max(sizes) == 400  # data.order alone is above the limit
    assert loaded_seed(path) == 4


def held_by_file(path: Path):
    from safetensors.torch import load_file

    return [list(load_file(shard).values()) for shard in sorted(path.glob("*.safetensors"))]


# --- what does not fit ---


@pytest.mark.promise("R6")
def test_all_misfits_are_listed_at_once(tmp_path):
    path = save_sample(tmp_path, 1, seed=1)
    into = blank(sample(1))
    del into["model.bias"]
    into |= {"model.new": torch.zeros(2), "model.w": torch.zeros(8, 6), "model.half": torch.zeros(5, 3)}
    into["data.order"] = torch.zeros(50)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, into, ONE)
    for line in (
        "missing in the checkpoint: model.new",
        "only in the checkpoint: model.bias [7] float16",
        "model.w: saved with shape [6, 8], wanted [8, 6]",
        "model.half: saved as bfloat16, wanted float32; cast=True converts",
        "data.order: saved as int64, wanted float32; these are never converted",
    ):
        assert line in str(error.value)
    assert all(not tensor.any() for tensor in into.values()), "a refused load changed something"


@pytest.mark.promise("R6")
def test_cast_converts_floating_dtypes_only(tmp_path):
    path = save_sample(tmp_path, 1, seed=1)
    into = blank(sample(1)) | {"model.half": torch.zeros(5, 3)}
    checkpoint.load(path, into, ONE, cast=True)
    assert same_bits({"w": into["model.half"]}, {"w": sample(1)["model.half"].float()})
    into["data.order"] = torch.zeros(50, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"data\.order: saved as int64, wanted int32; these are never converted"):
        checkpoint.load(path, into, ONE, cast=True)


def test_only_takes_a_part_on_purpose(tmp_path):
    path = save_sample(tmp_path, 1, seed=1)
    into = {name: tensor for name, tensor in blank(sample(1)).items() if name.startswith("model.")}
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: optimizer\.step \[\] int64"):
        checkpoint.load(path, into, ONE)
    checkpoint.load(path, into, ONE, only="model.")
    assert same_bits(into, {name: tensor for name, tensor in sample(1).items() if name.startswith("model.")})
    del into["model.w"]
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: model\.w"):
        checkpoint.load(path, into, ONE, only="model.")


@pytest.mark.promise("R6")
def test_other_tokenizer_is_refused():
    checkpoint.require_tokenizer({"tokenizer_sha256": "ab" * 32}, "ab" * 32, "run")
    with pytest.raises(CheckpointError, match=r"another tokenizer \(sha256 abababababab\.\.\.\) than the data \(cdcd"):
        checkpoint.require_tokenizer({"tokenizer_sha256": "ab" * 32}, "cd" * 32, "run")


def test_another_number_of_threads_is_said(tmp_path, caplog):
    path = save_sample(tmp_path, 1, seed=1)
    torch.set_num_threads(2)
    try:
        loaded_seed(path)
    finally:
        torch.set_num_threads(1)
    assert "was saved with 1 threads, this process has 2" in caplog.text


# --- what is not saved ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_non_finite_values_are_refused(tmp_path, value, dtype):
    save_sample(tmp_path, 1, seed=1)
    before = sorted(tmp_path.rglob("*"))
    bad = torch.zeros(3, 3)
    bad[1, 1] = value
    tensors = {"model.fine": torch.ones(2), "model.bad": bad.to(dtype), "optimizer.bad": bad, "mask": bad}
    with pytest.raises(CheckpointError, match=r"NaN or infinity: model\.bad, optimizer\.bad;"):
        checkpoint.save(tmp_path, 2, tensors, {}, ONE)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keep": 1}, "keep must be 2 or more, got 1"),
        ({"step": -1}, r"step must be in \[0, 10\^15\), got -1"),
        ({"state": {"a": float("nan")}}, "state must be JSON-able: Out of range float"),
        ({"state": {"a": torch.ones(1)}}, "state must be JSON-able: Object of type Tensor"),
        ({"state": {1: 2}}, "use text as the keys"),
        ({"state": [1]}, "state must be JSON-able and come back"),
        ({"tensors": {"z": torch.zeros(1, dtype=torch.complex64)}}, "z is complex64; a checkpoint can hold float64,"),
        ({"tensors": {"../z": torch.zeros(1)}}, "'../z' cannot be a tensor name"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, change, message):
    arguments = {"step": 1, "tensors": {}, "state": {}, "parallel": ONE} | change
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "ckpt", **arguments)
    assert not (tmp_path / "ckpt").exists()


# --- several checkpoints ---


def test_older_ones_are_removed(tmp_path):
    for step in range(1, 6):
        save_sample(tmp_path, step, seed=step, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003", "step-00000004", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in range(1, 4):
        path = save_sample(tmp_path, step, seed=step, keep=3)
    next(path.glob("*.safetensors")).unlink()
    save_sample(tmp_path, 4, seed=4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002", "step-00000003", "step-00000004"]


def test_an_unreadable_one_is_never_removed(tmp_path):
    path = save_sample(tmp_path, 1, seed=1)
    (path / "manifest.json").write_text("from a newer megakern")
    for step in (2, 3, 4):
        save_sample(tmp_path, step, seed=step)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000003", "step-00000004"]


def test_the_same_step_is_replaced(tmp_path):
    save_sample(tmp_path, 7, seed=1)
    path = save_sample(tmp_path, 7, seed=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]
    assert loaded_seed(path) == 2


def test_going_back_to_an_older_step_makes_that_the_newest(tmp_path):
    for step in (10, 20, 15):
        save_sample(tmp_path, step, seed=step, keep=3)
    assert loaded_seed(checkpoint.newest(tmp_path)) == 15


@pytest.mark.promise("R4")
def test_newest_passes_over_a_damaged_one_and_says_why(tmp_path, caplog):
    save_sample(tmp_path, 1, seed=1)
    shard = next(save_sample(tmp_path, 2, seed=2).glob("*.safetensors"))
    damage(shard)
    with caplog.at_level(logging.WARNING):
        assert loaded_seed(checkpoint.newest(tmp_path)) == 1
    assert (
        "step-00000002 is not sound, looking for an older one: rank-00000-part-000.safetensors: its SHA-256"
        in caplog.text
    )
    assert "names 'step-00000002', but the newest sound checkpoint is step-00000001" in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint in .*step-00000002: rank-00000") as error:
        checkpoint.newest(tmp_path)
    assert not isinstance(error.value, NoCheckpointError)


def test_latest_is_only_a_hint(tmp_path):
    for step in (1, 2):
        save_sample(tmp_path, step, seed=step)
    for text in (b"step-00000001\n", b"../../etc", b"\xff\x00" * 1000, b""):
        (tmp_path / "latest").write_bytes(text)
        assert loaded_seed(checkpoint.newest(tmp_path)) == 2
    (tmp_path / "latest").unlink()
    assert loaded_seed(checkpoint.newest(tmp_path)) == 2


def test_no_checkpoint_is_its_own_error(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        assert checkpoint.listing(folder) == []
        with pytest.raises(NoCheckpointError, match="no checkpoint in"):
            checkpoint.newest(folder)


@pytest.mark.promise("R5")
def test_an_extra_file_is_reported_and_never_read(tmp_path, caplog):
    path = save_sample(tmp_path, 1, seed=1)
    (path / "stray.safetensors").write_bytes(b"?")
    assert checkpoint.verify(path) == ["stray.safetensors: extra, the manifest does not know it"]
    assert loaded_seed(checkpoint.newest(tmp_path)) == 1
    assert "files that the manifest does not know, not read: stray.safetensors" in caplog.text


def test_nothing_of_the_machine_is_in_the_manifest(tmp_path):
    text = (save_sample(tmp_path, 1, seed=1) / "manifest.json").read_text()
    for secret in (str(tmp_path), os.path.expanduser("~"), os.uname().nodename):
        assert secret not in text


def test_a_checkpoint_of_the_first_schema_still_loads():
    path = Path(__file__).parent / "fixtures" / "checkpoint_schema_1" / "step-00000007"
    into = {"model.w": torch.zeros(3, 4), "model.half": torch.zeros(5, dtype=torch.bfloat16), "count": torch.tensor(0)}
    assert checkpoint.verify(path) == []
    assert checkpoint.load(path, into, ONE) == {"step": 7, "text": "schema 1"}
    assert into["model.w"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert into["model.half"].tolist() == [0, 0.5, 1, 1.5, 2] and into["count"].item() == 7


# --- what people see ---


def test_report(tmp_path):
    for step in (1, 2):
        path = save_sample(tmp_path / "ckpt", step, seed=step)
    text, sound = checkpoint.report("show", tmp_path)
    assert sound and "step 2, saved 20" in text and "  model.w  float32 [6, 8]" in text and "  seed = 2" in text
    assert checkpoint.report("show", path)[0] == text == checkpoint.show(path)
    text, sound = checkpoint.report("ls", tmp_path)
    assert sound and [line.split()[0] for line in text.splitlines()] == ["step-00000002", "step-00000001"]
    assert checkpoint.report("verify", tmp_path) == ("step-00000002: sound\nstep-00000001: sound", True)
    shard = next(path.glob("*.safetensors"))
    damage(shard)
    assert checkpoint.report("ls", path)[1] and not checkpoint.listing(tmp_path / "ckpt", deep=True)[0].valid
    text, sound = checkpoint.report("verify", tmp_path)
    assert not sound and text.startswith("step-00000002:\n  rank-00000-part-000.safetensors: its SHA-256")
    assert text.endswith("step-00000001: sound")
    os.truncate(shard, 100)
    problem = checkpoint.listing(tmp_path / "ckpt")[0].problem
    assert problem.startswith("rank-00000-part-000.safetensors: 100 bytes, the manifest says ")
    (path / "manifest.json").unlink()
    text, sound = checkpoint.report("ls", tmp_path)
    assert not sound and "manifest.json is missing: not a checkpoint, or one that was never finished" in text
    with pytest.raises(NoCheckpointError, match="no checkpoint in"):
        checkpoint.report("ls", tmp_path / "ckpt" / "step-00000009")
    with pytest.raises(ValueError, match="action must be ls, show or verify, got 'rm'"):
        checkpoint.report("rm", tmp_path)


def test_space_is_looked_at_first(tmp_path):
    class Full(Files):
        def free_bytes(self, path):
            return 4000

        def create(self, path):
            raise AssertionError("wrote without looking at the space")

    with pytest.raises(CheckpointError, match=rf"no space in {tmp_path}: 0\.1 MB needed, 0\.0 MB free"):
        save_sample(tmp_path, 1, seed=1, files=Full())
    assert os.listdir(tmp_path) == []
