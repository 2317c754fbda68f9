"""What is said of a failure: the cause before its consequences, in one message. Records are made here, no ranks run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakern.parallel import trace
from megakern.train import watch
from megakern.train.watch import Report, divergence
from tests.checkpoints import start_child


@pytest.fixture
def ranks_at(tmp_path):
    """`ranks_at([4, 8], [4, 8, 2])` -> recorders of ranks that made all-reduces of so many elements in step 5."""

    def make(*sizes: list[int]) -> list[trace.Recorder]:
        watch.folder_of(tmp_path).mkdir(exist_ok=True)
        recorders = []
        for rank, made in enumerate(sizes):
            recorder = trace.Recorder(watch.trace_file(tmp_path, rank), rank, len(sizes))
            recorder.begin_step(5)
            recorder.phase("backward of micro-batch 1 of 1")
            for size in made:
                recorder.collective("all_reduce", torch.empty(size), None)
            recorders.append(recorder)
        return recorders

    return make


def why(run, world: int, codes: list[int | None] | None = None) -> str:
    return Report.of(run, world, codes).why


def test_a_rank_that_is_behind_is_named_with_what_the_others_wait_in(ranks_at, tmp_path):
    ranks_at([4, 8, 16], [4, 8], [4, 8, 16])
    said = why(tmp_path, 3, [1, None, 1])
    assert said.startswith("rank 0 ended with exit code 1")  # without a record of its failure
    for recorder in ranks_at([4, 8, 16], [4, 8], [4, 8, 16])[::2]:
        recorder.fail("collective", "RuntimeError: Timed out waiting 4000ms for recv operation to complete")
    assert why(tmp_path, 3, [1, None, 1]) == (
        "rank 1 is behind, at step 5, in backward of micro-batch 1 of 1; last collective: all_reduce [8] float32 over "
        "all ranks, collective 2 of step 5; rank 0 waited in all_reduce [16] float32 over all ranks, collective 3 of "
        "step 5"
    )


def test_the_first_difference_is_told_with_the_ranks_that_are_fewer():
    def calls(*texts: str) -> list[trace.Collective]:
        return [trace.Collective(3, i + 1, 0, 0.0, text) for i, text in enumerate(texts)]

    same = {0: calls("a", "b", "c"), 1: calls("a", "b"), 2: calls("a", "b", "c")}
    assert divergence(same) is None
    said = divergence({0: calls("a", "b", "c"), 1: calls("a", "c"), 2: calls("a", "b", "c")})
    assert said == (
        "rank 1 called c, collective 2 of step 3; rank 0, 2 called b there: the ranks no longer do the same"
    )


def test_causes_come_before_consequences(ranks_at, tmp_path):
    """An own error, then different collectives, a kill, and an abort last: gloo and NCCL abort as a consequence."""
    dead, aborted = -signal.SIGKILL, -signal.SIGABRT
    ranks_at([4], [4])
    assert "rank 1 died by SIGKILL" in why(tmp_path, 2, [aborted, dead])
    assert "rank 0 died by SIGABRT" in why(tmp_path, 2, [aborted, 1])
    recorders = ranks_at([4], [])  # rank 1 skipped the rest of step 5
    recorders[1].begin_step(6)
    recorders[1].phase("gradient norm")
    said = why(tmp_path, 2, [aborted, 1])
    assert re.match(
        r"rank 0 died by SIGABRT, at step 5, .*; rank 1 was at step 6, in gradient norm: the ranks no", said
    )
    ranks_at([4], [8])
    assert "the ranks no longer do the same" in why(tmp_path, 2, [aborted, 1])
    recorders = ranks_at([4], [8])
    recorders[0].fail("collective", "RuntimeError: Connection closed by peer")
    recorders[1].fail("error", "ValueError: bad")
    assert why(tmp_path, 2, [1, 1]).startswith("rank 1 raised ValueError: bad, at step 5, in backward of micro-batch 1")


def test_a_stopped_process_is_seen_and_one_that_went_without_a_word(ranks_at, tmp_path):
    """As seen from another rank under torchrun or Slurm, which knows no exit codes."""

    def record() -> None:
        recorder = trace.Recorder(watch.trace_file(tmp_path, 1), 1, 2)
        recorder.begin_step(5)
        recorder.phase("gradient norm")
        signal.raise_signal(signal.SIGSTOP)

    ranks_at([4])
    pid, out = start_child(record)
    os.close(out)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert why(tmp_path, 2).startswith("rank 1 is stopped (SIGSTOP, or a debugger), at step 5")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert why(tmp_path, 2).startswith("rank 1 died without a word (killed, or a crash outside of Python), at step 5")


def test_an_error_of_the_user_needs_only_its_message(ranks_at, tmp_path, capsys):
    for recorder in ranks_at([4], [4]):
        recorder.fail("checkpoint", "no space in ckpt: 3 MB needed, 1 MB free")
    Report.of(tmp_path, 2, [1, 1]).tell()
    assert capsys.readouterr().err == "megakern: no space in ckpt: 3 MB needed, 1 MB free\n"
    ranks_at([4], [4])[1].fail("settings", "data/train.bin holds id 300")
    Report.of(tmp_path, 2, [None, 2]).tell()
    assert capsys.readouterr().err == "megakern: rank 1: data/train.bin holds id 300\n"
    assert not list(tmp_path.glob("failure-*"))


def test_the_file_holds_every_rank_and_the_message_the_first_ones(ranks_at, tmp_path, capsys):
    for rank, recorder in enumerate(ranks_at(*[[4, 8]] * 20)):
        kind = "error" if rank == 13 else "collective"
        recorder.fail(kind, f"RuntimeError: of rank {rank} [/gloo/pair.cc] reset. This is typically caused by a worker")
    Report.of(tmp_path, 20, [1] * 20).tell()
    message = capsys.readouterr().err
    assert message.startswith("megakern: rank 13 raised RuntimeError: of rank 13")
    assert "and 11 more ranks" in message
    assert "typically" not in message
    text = Path(re.search(r"stack: (\S+)", message)[1]).read_text()
    for rank in range(20):
        assert f"rank {rank} (process {os.getpid()} on " in text
        assert f"rank {rank}: its last collectives, oldest first" in text


def test_stacks_of_living_ranks_are_asked_for(tmp_path):
    """A child that waits in a call; SIGUSR2 makes it write where, without ending it."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom megakern.train import watch\n"
        "watch.begin(Path(sys.argv[1]), 0, 1)\nprint('ready', flush=True)\n"
        "def waits_here(): time.sleep(60)\nwaits_here()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        end = 100
        while "waits_here" not in watch.stacks_file(tmp_path, 0).read_text() and end:
            watch.ask_for_stacks(tmp_path, 1)
            end -= 1
        assert child.poll() is None
        child.kill()
    assert "in waits_here" in watch.stacks_file(tmp_path, 0).read_text()


def raised(function) -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        function()
    return caught.value


def test_errors_of_the_collectives_are_told_from_a_ranks_own():
    def own() -> None:
        raise RuntimeError("mine")

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def gloo() -> None:
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error")

    assert watch.kind_of(raised(own)) == "error"
    assert watch.kind_of(raised(out_of_memory)) == "error"
    assert watch.kind_of(raised(gloo)) == "collective"
    assert watch.kind_of(dist.DistNetworkError("reset")) == "collective"
