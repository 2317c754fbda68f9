"""Saving while things go wrong: each file operation in turn, kill -9, a full disk, a folder that may not be written.

After each fault the newest checkpoint loads, and is bit for bit the one before the save or the new one. About 15 s.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from megakern.train import checkpoint, checkpoint_plan
from megakern.train.checkpoint import CheckpointError
from megakern.train.files import REAL, Files
from tests.checkpoints import FaultyFiles, in_child, loaded_seed, sample, save_sample, start_child

OLD, NEW = 100, 200  # seeds of the tensors

# name: (steps saved before, the step that is saved under faults)
SCENARIOS = {"first ever": ([], 1), "a new step": ([1, 2], 3), "the same step": ([2], 2)}
FAULTS = ("error", "error-on", "short", "torn", "lie")
KILLS = ("exit", "late-exit", "torn-exit")
KINDS = [
    pytest.param(kind, marks=pytest.mark.promise(name))
    for name, kinds in (("R3", FAULTS), ("R2", KILLS))
    for kind in kinds
]
NAMES = re.compile(r"latest|step-\d{8,15}")


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(checkpoint_plan, "PART_BYTES", 450)  # two files a checkpoint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_operation_fails_in_turn(tmp_path, trials, scenario, kind):
    steps, step = SCENARIOS[scenario]
    old = OLD + len(steps) - 1 if steps else None
    counter = FaultyFiles(-1, kind)
    before = tmp_path / "before"
    before.mkdir()
    for index, earlier in enumerate(steps):
        save_sample(before, earlier, seed=OLD + index)
    save_sample(shutil.copytree(before, tmp_path / "counted"), step, NEW, counter)
    assert counter.count > 20
    seen = set()
    writes_only = kind in ("short", "torn", "torn-exit", "lie")
    for k in [k for k, name in enumerate(counter.names) if name == "write" or not writes_only]:
        trials()
        folder = shutil.copytree(before, tmp_path / f"{k}")
        raised, died = False, False
        if kind.endswith("exit"):
            code, text = in_child(lambda f=folder, k=k: save_sample(f, step, NEW, FaultyFiles(k, kind)))
            assert code == 9, text
            died = True
        else:
            try:
                save_sample(folder, step, NEW, FaultyFiles(k, kind))
            except CheckpointError as error:
                raised = True
                assert str(folder) in str(error)
        try:
            found = loaded_seed(checkpoint.newest(folder))
        except checkpoint.NoCheckpointError:
            found = None
        assert found in (old, NEW), f"operation {k}: neither the old nor the new one"
        assert found == NEW or raised or died, f"operation {k}: save returned, but the old one is the newest"
        seen.add(found)
        if raised and kind == "error" and found != NEW:
            assert sorted(os.listdir(folder)) == ["latest"] * bool(steps) + [f"step-{s:08d}" for s in steps]
        # The next save works, and takes away all that was left.
        save_sample(folder, step + 1, NEW + 1)
        assert loaded_seed(checkpoint.newest(folder)) == NEW + 1
        left = os.listdir(folder)
        assert all(NAMES.fullmatch(name) for name in left), left
        assert not [fault for name in left if name != "latest" for fault in checkpoint.verify(folder / name)]
    if kind.endswith("exit") and kind != "torn-exit":
        assert seen == {old, NEW}


class Recorder(Files):
    """Writes down what is done to which name."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.open: dict[int, str] = {}

    def create(self, path):
        descriptor = super().create(path)
        self.open[descriptor] = path.name
        return descriptor

    def sync(self, descriptor):
        super().sync(descriptor)
        self.done.append(f"fsync {self.open[descriptor]}")

    def sync_folder(self, path):
        super().sync_folder(path)
        self.done.append(f"fsync folder {path.name}")

    def rename(self, old, new):
        super().rename(old, new)
        self.done.append(f"rename {old.name} {new.name}")

    replace = rename

    def remove_folder(self, path):
        super().remove_folder(path)
        self.done.append(f"remove {path.name}")


def test_the_order_of_what_reaches_the_disk(tmp_path):
    """A power cut cannot be made here, so the order of the system calls is the proof."""
    for step in (1, 2):
        save_sample(tmp_path, step, step)
    files = Recorder()
    for step in (3, 3):
        files.done.append(f"save {step}")
        save_sample(tmp_path, step, step, files)
    assert [re.sub("(tmp|old)-[0-9a-f]{8}", r"\1", line) for line in files.done] == [
        "save 3",
        "fsync rank-00000-part-000.safetensors",
        "fsync rank-00000-part-001.safetensors",
        "fsync manifest.json",
        "fsync folder step-00000003.tmp",
        "rename step-00000003.tmp step-00000003",
        f"fsync folder {tmp_path.name}",
        "fsync latest.tmp",
        "rename latest.tmp latest",
        f"fsync folder {tmp_path.name}",
        "rename step-00000001 step-00000001.tmp",
        "remove step-00000001.tmp",
        "save 3",
        "fsync rank-00000-part-000.safetensors",
        "fsync rank-00000-part-001.safetensors",
        "fsync manifest.json",
        "fsync folder step-00000003.tmp",
        "rename step-00000003 step-00000003.old",
        "rename step-00000003.tmp step-00000003",
        f"fsync folder {tmp_path.name}",
        "fsync latest.tmp",
        "rename latest.tmp latest",
        f"fsync folder {tmp_path.name}",
        "rename step-00000003.old step-00000003.tmp",
        "remove step-00000003.tmp",
    ]


def test_the_message_has_path_need_and_free(tmp_path):
    with pytest.raises(CheckpointError, match=r"saving step 1 to .*No space left on device: '.*-part-000.safetensors'"):
        save_sample(tmp_path, 1, 1, FaultyFiles(3, "torn"))
    with pytest.raises(CheckpointError, match=r"; 0\.0 MB needed, \d+\.\d MB free$"):
        save_sample(tmp_path, 1, 1, FaultyFiles(3, "torn"))
    assert os.listdir(tmp_path) == []


def test_a_failed_last_fsync_says_that_the_checkpoint_is_there(tmp_path):
    class NoFolderSync(FaultyFiles):
        def sync_folder(self, path):
            if path == tmp_path:
                raise OSError(5, "Input/output error", str(path))

    with pytest.raises(
        CheckpointError, match=r"step-00000001 is complete, but fsync of .* failed: .*Input/output error"
    ):
        save_sample(tmp_path, 1, 1, NoFolderSync(-1, "error"))
    assert loaded_seed(checkpoint.newest(tmp_path)) == 1


def test_trouble_after_saving_is_a_warning(tmp_path, caplog):
    class NoUnlink(FaultyFiles):
        def unlink(self, path):
            raise OSError(13, "Permission denied", str(path))

    for step in (1, 2):
        save_sample(tmp_path, step, step)
    save_sample(tmp_path, 3, 3, NoUnlink(-1, "error"))
    assert "step-00000003 is saved, but tidying up in" in caplog.text and "Permission denied" in caplog.text
    save_sample(tmp_path, 4, 4)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003", "step-00000004"]


def test_what_a_killed_replacement_left_is_put_back(tmp_path):
    save_sample(tmp_path, 2, seed=2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.old-0123abcd")
    assert loaded_seed(checkpoint.newest(tmp_path)) == 2
    save_sample(tmp_path, 3, seed=3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002", "step-00000003"]
    assert loaded_seed(tmp_path / "step-00000002") == 2


def test_only_our_own_leftovers_are_removed(tmp_path):
    ours = ["step-00000009.tmp-0123abcd", "latest.tmp-0123abcd"]
    theirs = ["step-00000009.tmp-backup", "notes.tmp-0123abcd", "step-9.tmp-0123abcd", "step-00000009.tmp-0123abcd.zip"]
    for name in ours + theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "step-00000008.tmp-0123abcd").symlink_to(tmp_path / "kept")
    save_sample(tmp_path, 1, 1)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "kept", "latest", "step-00000001"])
    assert (tmp_path / "kept" / "file").exists()


# --- kill -9 ---


def save_for_ever(folder: Path, seed: int, ready: int) -> None:
    for turn in range(10**6):
        save_sample(
            folder, seed + turn // 2, seed + turn, REAL
        )  # each step twice: a new folder, then over an existing one
        if turn == 0:
            os.write(ready, b"1")


@pytest.mark.promise("R2")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_at_random_times(tmp_path, trials, count):
    chance = random.Random(1)
    started = time.perf_counter()
    save_sample(tmp_path, 2, 2, REAL)
    window = 4 * (time.perf_counter() - started)
    inside = 0
    for number in range(1, count + 1):
        trials()
        out, into = os.pipe()
        pid, text = start_child(lambda n=number, into=into: save_for_ever(tmp_path, n * 10**6, into))
        assert os.read(out, 1) == b"1"
        time.sleep(chance.random() * window)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in (out, into, text):
            os.close(descriptor)
        inside += any(not NAMES.fullmatch(name) for name in os.listdir(tmp_path))
        assert loaded_seed(checkpoint.newest(tmp_path)) >= number * 10**6
    assert inside > 0, "no kill came inside a save"
    save_sample(tmp_path, 10**9, seed=1)
    assert all(NAMES.fullmatch(name) for name in os.listdir(tmp_path)), os.listdir(tmp_path)


# --- a full disk, a folder that may not be written ---


def save_with_limit(folder: Path, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CheckpointError) as error:
        save_sample(folder, 2, seed=2)
    return str(error.value)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("limit", [0, 100, 700, 1200])
def test_disk_full_for_real(tmp_path, limit):
    save_sample(tmp_path, 1, seed=1)
    code, text = in_child(lambda: save_with_limit(tmp_path, limit))
    assert code == 0, text
    assert re.search(rf"File too large: '{tmp_path}/step-00000002\.tmp-.*'; 0\.0 MB needed, \d+\.\d MB free", text), (
        text
    )
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert loaded_seed(checkpoint.newest(tmp_path)) == 1


def save_as_nobody(folder: Path) -> str:
    if os.geteuid() == 0:
        os.setuid(65534)
    with pytest.raises(CheckpointError) as error:
        save_sample(folder, 2, seed=2)
    return f"{error.value} | {loaded_seed(checkpoint.newest(folder))}"


@pytest.mark.promise("R3")
def test_read_only_folder():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: nobody may not enter that
        os.chmod(name, 0o755)
        folder = Path(name) / "ckpt"
        save_sample(folder, 1, seed=1)
        os.chmod(folder, 0o555)
        code, text = in_child(lambda: save_as_nobody(folder))
        os.chmod(folder, 0o755)
        assert code == 0, text
        assert re.search(rf"cannot write to {folder}: .*Permission denied: .* \| 1$", text), text


@pytest.mark.promise("R3")
def test_a_file_stands_where_the_folder_should_be(tmp_path):
    (tmp_path / "ckpt").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write to .*ckpt: \[Errno 17\] File exists"):
        save_sample(tmp_path / "ckpt", 1, seed=1)


@pytest.mark.promise("R3")
def test_the_folder_vanishes_during_the_save(tmp_path):
    class Vanish(FaultyFiles):
        def sync(self, descriptor):
            shutil.rmtree(tmp_path / "ckpt")

    with pytest.raises(CheckpointError, match="No such file or directory"):
        save_sample(tmp_path / "ckpt", 1, 1, Vanish(-1, "error"))
    assert loaded_seed(save_sample(tmp_path / "ckpt", 2, seed=2)) == 2


def test_an_interrupt_is_not_swallowed(tmp_path):
    class Interrupted(FaultyFiles):
        def rename(self, old, new):
            raise KeyboardInterrupt

    save_sample(tmp_path, 1, seed=1)
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save_sample(tmp_path, step, 5, Interrupted(-1, "error"))
        assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert loaded_seed(checkpoint.newest(tmp_path)) == 1


def test_samples_differ_in_every_tensor():
    a, b = sample(1), sample(2)
    assert all((a[name] != b[name]).any() for name in a)
