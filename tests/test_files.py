"""File operations and the lock of a run. About 2 s."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from megakern.train.files import REAL, RunInUseError, RunLock, write_atomic
from tests.checkpoints import FaultyFiles, in_child, start_child

KINDS = ("error", "error-on", "short", "torn", "lie", "exit", "late-exit", "torn-exit")


def operations(work) -> int:
    files = FaultyFiles(-1, "error")
    work(files)
    return files.count


@pytest.mark.parametrize("kind", KINDS)
def test_write_atomic_leaves_the_old_or_the_new(tmp_path, kind):
    path, old, new = tmp_path / "config.toml", b"old" * 100, b"new" * 77
    count = operations(lambda files: write_atomic(path, old, files))
    assert count == 6  # create, write, fsync, close, replace, fsync of the folder
    for k in range(count):
        path.write_bytes(old)
        before = set(os.listdir(tmp_path))
        if kind.endswith("exit"):
            code, _ = in_child(lambda k=k: write_atomic(path, new, FaultyFiles(k, kind)))
            assert code == (0 if kind == "torn-exit" and k != 1 else 9)
        else:
            failed = False
            try:
                write_atomic(path, new, FaultyFiles(k, kind))
            except OSError:
                failed = True
            assert failed == (kind in ("error", "error-on") or (kind in ("torn", "lie") and k == 1))
            if kind != "error-on":
                assert set(os.listdir(tmp_path)) == before, "a temporary file stayed"
            if not failed:
                assert path.read_bytes() == new
        assert path.read_bytes() in (old, new)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json\.tmp-[0-9a-f]{8}'"):
        write_atomic(tmp_path / "a.json", b"x" * 10, FaultyFiles(1, "torn"))
    with pytest.raises(OSError, match=r"10 bytes were written, the file has 5: '.*a\.json") as error:
        write_atomic(tmp_path / "a.json", b"x" * 10, FaultyFiles(1, "lie"))
    assert error.value.errno == errno.EIO


def test_a_disk_that_takes_nothing_is_an_error(tmp_path):
    class Stuck(FaultyFiles):
        def write(self, descriptor, data):
            return 0

    with pytest.raises(OSError, match="the disk takes no more bytes"):
        Stuck(-1, "error").write_file(tmp_path / "a", b"x")


def test_a_new_file_does_not_follow_a_planted_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        REAL.write_file(tmp_path / "link", b"x")
    assert not (tmp_path / "victim").exists()


def test_remove_tree_does_not_follow_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "doomed").mkdir()
    (tmp_path / "doomed" / "link").symlink_to(tmp_path / "kept")
    REAL.remove_tree(tmp_path / "doomed")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    REAL.remove_tree(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["kept"] and (tmp_path / "kept" / "file").exists()


def hold(folder, ready: int) -> None:
    with RunLock(folder):
        os.write(ready, b"1")
        time.sleep(60)


def start_holder(folder, work=hold) -> int:
    """A child process that holds the lock of `folder` by now."""
    out, into = os.pipe()
    pid, text = start_child(lambda: work(folder, into))
    assert os.read(out, 1) == b"1"
    for descriptor in (out, into, text):
        os.close(descriptor)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_lock_keeps_a_second_run_out_and_names_the_first(tmp_path):
    pid = start_holder(tmp_path / "run")
    try:
        with pytest.raises(
            RunInUseError, match=rf"another run writes to .*run: process {pid} on .* holds lock; stop that"
        ):
            RunLock(tmp_path / "run").__enter__()
    finally:
        end(pid)
    with (
        RunLock(tmp_path / "run"),  # kill -9 freed it
        RunLock(tmp_path / "other run"),
        pytest.raises(RunInUseError, match=f"process {os.getpid()} on"),
    ):
        RunLock(tmp_path / "run").__enter__()
    with RunLock(tmp_path / "run"):
        pass


def hold_with_worker(folder, ready: int) -> None:
    with RunLock(folder):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        (folder / "worker").write_text(str(worker))
        os.write(ready, b"1")
        time.sleep(60)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    end(start_holder(tmp_path, hold_with_worker))
    try:
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
