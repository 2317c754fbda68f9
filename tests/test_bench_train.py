"""What bench_train compares is the same: models of all makers have the same losses over three steps. No device."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

import megakern as mk
from benchmarks import bench_train, report, steps
from benchmarks.bench_train import Workload
from benchmarks.contestants import NotHereError
from benchmarks.peers import libraries

CPU = torch.device("cpu")
GPT2 = bench_train.gpt2("tiny-gpt2", vocab_size=250)
LLAMA = dataclasses.replace(mk.presets["tiny-llama"], vocab_multiple=1)


def losses(name: str, config: mk.GPTConfig, count: int = 3) -> list[float]:
    step, workload = steps.make_step(name, config, CPU), Workload("tiny", config, 3, (name,))
    return [step(*bench_train.batch_of(workload, i)) for i in range(count)]


@pytest.mark.parametrize(
    "config, first, others",
    [
        (
            GPT2,
            "plain fp32",
            [
                "transformers fp32",
                "transformers fp32 patched",
                "megakern fp32",
                "megakern bf16",
                "megakern bf16 split",
                "megakern bf16 split lean",
            ],
        ),
        (
            LLAMA,
            "transformers fp32",
            ["transformers fp32 patched", "transformers bf16 autocast patched", "megakern fp32", "megakern bf16"],
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_all_train_the_same_model(config, first, others):
    pytest.importorskip("transformers", reason="a peer of this comparison: pip install megakern[dev]")
    expected = losses(first, config)
    for name in others:
        assert bench_train._disagreement(name, losses(name, config), expected) is None
    other = losses("megakern fp32", dataclasses.replace(config, norm_eps=0.1))
    assert "the first contestant has" in bench_train._disagreement("megakern fp32", other, expected)


def test_who_is_not_here_says_why(monkeypatch):
    with pytest.raises(NotHereError, match="the plain GPT is a GPT-2; beside a Llama stands transformers'"):
        steps.make_step("plain fp32", LLAMA, CPU)
    monkeypatch.setitem(libraries.LIBRARIES, "transformers", ("no_such_module", "transformers", False))
    with pytest.raises(NotHereError, match="not installed: pip install transformers"):
        steps.make_step("transformers fp32", GPT2, CPU)
    assert steps.our_weights(LLAMA, CPU) is None  # and ours starts from its own initial values
    assert len(losses("megakern bf16 split", LLAMA, 1)) == 1


def test_a_lean_step_is_lean_and_a_small_gpu_is_told(monkeypatch):
    settings = steps.run_config(GPT2, "bf16 split lean")
    assert (settings.train.recompute, settings.optimizer.state_dtype) == ("full", "bfloat16")
    (large,) = (each for each in bench_train.WORKLOADS["cuda"] if each.memory)
    assert 12 * bench_train.mk_parameters(large.config) < 0.95 * large.memory  # weights, low halves, gradients, moments
    monkeypatch.setattr(bench_train.machine, "device_type", lambda: "cuda")
    monkeypatch.setattr(bench_train.machine, "cores", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=85e9))
    with pytest.raises(NotHereError, match="needs 110 GB, this GPU has 85"):
        bench_train.Training(large.contestants[0], large)


class Here:
    """A contestant in this process: `contestants.Contestant` without its cost; tests/test_bench.py has the real one."""

    def __init__(self, make, name, setting):
        self.name = name
        try:
            self.made = make(name, setting)
        except NotHereError as reason:
            self.made, self.reason = None, reason

    def call(self, method, *arguments):
        if self.made is None:
            raise self.reason
        return getattr(self.made, method)(*arguments)

    def end(self):
        pass


def test_a_workload_from_end_to_end(monkeypatch):
    """Turns, a group at a time, goals, profiles; a contestant that is not here is a row."""
    monkeypatch.setattr(bench_train, "Contestant", Here)
    monkeypatch.setattr(bench_train.machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(bench_train.machine, "cores", lambda: 1)  # threads cost more than they do here
    monkeypatch.setattr(bench_train, "MOST_TURNS", 1)
    goals = (("bf16 beside fp32", "megakern bf16", ("plain fp32",), 0.0),)
    names = ("plain fp32", "megakern fp32", "megakern bf16", "Megatron-Core bf16 masters")
    workload = Workload("tiny", GPT2, 3, names, at_once=2, goals=goals)
    result = bench_train.measure(workload, names, deadline=time.monotonic() + 600)
    assert [row["contestant"] for row in result["rows"]] == list(names)
    assert result["rows"][-1]["missing"] == "runs on NVIDIA GPUs only"
    assert result["rows"][0]["ratio_to_first"] == 1 and result["goals"][0]["against"] == "plain fp32"
    for row in result["rows"][:3]:
        assert row["turns"] >= 1 and row["ms"] > 0 and row["peak_bytes"] > 1e6 and row["breakdown"]["ms"]["GEMM"] > 0
        assert row["mfu_full"] > row["mfu_causal"] > 0
    table = report.train_table(result)
    assert "not timed: Megatron-Core bf16 masters: runs on NVIDIA GPUs only" in table and "profile, ms a step" in table


def test_a_baseline_that_fails_is_a_row_and_the_others_are_timed(monkeypatch):
    monkeypatch.setattr(bench_train, "Contestant", Here)
    monkeypatch.setattr(bench_train.machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(bench_train.machine, "cores", lambda: 1)  # threads cost more than they do here
    monkeypatch.setattr(bench_train, "MOST_TURNS", 1)
    workload = Workload("tiny", GPT2, 3, ("Megatron-Core bf16 masters", "megakern fp32"))
    result = bench_train.measure(workload, workload.contestants, deadline=time.monotonic() + 600)
    assert result["rows"][0]["missing"] == "runs on NVIDIA GPUs only"
    assert result["rows"][1]["ms"] > 0 and result["rows"][1]["ratio_to_first"] is None
    assert "not timed: Megatron-Core bf16 masters" in report.train_table(result)
    late = bench_train.measure(workload, ("megakern fp32", "plain fp32"), deadline=0.0)
    assert late["rows"][0]["turns"] == 1 and late["rows"][1]["missing"] == "no time left"
