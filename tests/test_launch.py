"""Starting and joining processes: the environment of torchrun and Slurm, signals. No device needed."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from megakern.config import ConfigError
from megakern.train import launch
from megakern.train.config import ParallelConfig

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # known to monkeypatch, so that what `launch.join` sets is taken back too
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_alone_without_a_launcher(environment):
    assert launch.joined_world() is None
    environment(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_JOB_ID="7")  # a batch script itself, not a step of srun
    assert launch.joined_world() is None


def test_torchrun(environment):
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    assert launch.joined_world() == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


def test_slurm(environment):
    environment(
        SLURM_STEP_ID="0",
        SLURM_NTASKS="16",
        SLURM_PROCID="9",
        SLURM_LOCALID="1",
        SLURM_NTASKS_PER_NODE="8",
        SLURM_JOB_NODELIST="gpu[07-08]",
        SLURM_JOB_ID="123456",
    )
    world = launch.joined_world()
    assert (world["RANK"], world["WORLD_SIZE"], world["LOCAL_RANK"], world["LOCAL_WORLD_SIZE"]) == ("9", "16", "1", "8")
    assert (world["MASTER_ADDR"], world["MASTER_PORT"]) == ("gpu07", "23456")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[001-004]", "node001"), ("a-b[12,14-16],c3", "a-b12"), ("x1,x2", "x1")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_the_layout_must_have_the_number_of_processes(environment):
    with pytest.raises(ConfigError, match=r"parallel.tp = 2 x parallel.dp = 1 needs 2 processes, but there are 1;"):
        launch.join(ParallelConfig(tp=2))
    environment(RANK="0", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match=r"tp = 1 x parallel.dp = 4 needs 4 processes, but there are 2; .*--nproc 4"):
        launch.join(ParallelConfig(dp=4))
    with pytest.raises(ConfigError, match=r"parallel.replicas = 4 does not divide parallel.dp = 2"):
        launch.join(ParallelConfig(replicas=4))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"parallel.fused_collectives was asked for, but symmetric memory needs"):
            launch.join(ParallelConfig(tp=2, fused_collectives=True))


def test_stop_request_remembers_the_signal():
    before = {number: signal.getsignal(number) for number in launch.FORWARDED}
    stop = launch.StopRequest()
    try:
        stop.listen()
        assert stop.number == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_second_signal_leaves_at_once():
    pid = os.fork()
    if pid == 0:
        stop = launch.StopRequest()
        stop.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
