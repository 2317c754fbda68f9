"""The benchmarks tell the truth: tables and pictures are those of the results, profiles add up, memory is counted,
wrong options are refused. Speeds themselves are not tested. No device needed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_activation, bench_patch, breakdown, plots, report, suite, tables
from benchmarks.contestants import Contestant, FailedError, NotHereError, goal, ratio_to
from benchmarks.peers import libraries
from benchmarks.timing import CpuClock
from megakern.bench import bench, find_suite
from megakern.config import ConfigError
from tests import test_architecture

# --- what is shown is what was measured ---


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.parent.name)
def test_pages_are_those_of_the_results(page):
    assert page.read_text() == tables.pages()[page], "run: python -m benchmarks.tables --write"


@pytest.mark.parametrize("folder", tables.folders(), ids=lambda folder: folder.name)
def test_pictures_are_those_of_the_results(folder):
    for name, results in plots.drawn(folder).items():
        for ending in plots.ENDINGS:
            picture = plots.FOLDER / folder.name / f"{name}.{ending}"
            assert plots.digest_in(picture) == plots.digest(results), "run: python -m benchmarks.plots"


def test_a_picture_of_other_figures_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "docs")
    folder = tmp_path / "machine"
    shutil.copytree(tables.RESULTS / "xeon-avx512-2core", folder)
    (tmp_path / "machine" / "README.md").unlink(missing_ok=True)
    made = plots.draw(folder)
    assert {path.name for path in made} >= {"train.png", "train.svg", "ops.png", "ops.svg"}
    results = json.loads((folder / "train.json").read_text())
    assert all(plots.digest_in(p) == plots.digest(results) for p in made if p.stem == "train")
    results["workloads"][0]["rows"][0]["ms"] += 1
    assert plots.digest_in(tmp_path / "docs" / "machine" / "train.png") != plots.digest(results)


def test_ops_have_a_ratio_to_each_peer_and_name_who_is_not_here():
    label = {"op": "norm", "shape": "3x8", "dtype": "fp32", "backward": False}
    time = {"rate": 2e9, "unit": "B/s", "share_of_limit": 0.5, "peak_bytes": 96}
    rows = [
        {**label, **time, "contestant": "megakern", "us": 20.0, "fastest_us": 19.0, "slowest_us": 25.0},
        {**label, **time, "contestant": "torch", "us": 30.0, "fastest_us": 29.0, "slowest_us": 35.0},
        {**label, **time, "contestant": "torch.compile", "us": 10.0, "fastest_us": 9.0, "slowest_us": 11.0},
        {**label, "contestant": "Liger", "missing": "not installed: pip install liger-kernel"},
        {**label, "contestant": "torch", "shape": "5x8", "missing": "takes no 5 rows"},
    ]
    table = report.op_table(rows)
    line = next(line for line in table.splitlines() if line.startswith("| norm"))
    for cell in ("20 (19 to 25)", "2 GB/s", "50%", "96 B", "torch 1.50, torch.compile 0.50"):
        assert cell in line, (cell, line)
    assert "not here: Liger (not installed: pip install liger-kernel)" in table
    assert "not here for 5x8: torch (takes no 5 rows)" in table
    assert "0.50 (0.50 to 0.50)" in report.op_summary({"norm": {"rows": rows}})  # beside the fastest peer


def test_goals_are_judged_by_the_fastest_peer():
    rows = [{"contestant": name, "rate": rate} for name, rate in (("a", 10.0), ("b", 20.0), ("ours", 30.0))]
    held = goal(rows, "what", "ours", ("a", "b"), 1.4, "rate")
    assert held == {"what": "what", "wanted": 1.4, "reached": 1.5, "against": "b"}
    assert "yes" in report.goals_table([held]) and "no" in report.goals_table([{**held, "wanted": 1.6}])
    assert goal(rows, "what", "ours", ("c",), 1.4, "rate") is None
    assert ratio_to([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


# --- how it is measured ---


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.ones(1000)

    def call():
        y = x + 1  # 4000 bytes
        z = y + 1  # 4000 more, both held
        del y
        return z + z  # the first block is free again

    assert 8000 <= CpuClock.peak_bytes(call) < 9000
    assert CpuClock.peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mm", "GEMM"), ("megakern::linear_forward", "GEMM"), ("nvjet_tst_128x256", "GEMM"),
        ("megakern::attention_backward", "attention"), ("aten::_scaled_dot_product_attention", "attention"),
        ("megakern::norm_forward", "norms"), ("aten::native_layer_norm_backward", "norms"),
        ("aten::linalg_vector_norm", "optimizer"), ("aten::_fused_adamw_", "optimizer"),
        ("megakern::sum_of_squares", "optimizer"),
        ("aten::_log_softmax_backward_data", "loss"), ("megakern::cross_entropy_forward", "loss"),
        ("aten::embedding_dense_backward", "embedding"), ("ncclDevKernel_AllReduce_Sum_bf16_RING", "communication"),
        ("aten::copy_", breakdown.REST), ("aten::gelu", breakdown.REST),
    ],
)  # fmt: skip
def test_every_op_and_kernel_has_its_kind(name, kind):
    assert breakdown.kind_of(name) == kind


# Part of a step by the start of the source's name.
PARTS = {"activation": breakdown.REST, "adamw": "optimizer", "attention": "attention", "cross_entropy": "loss",
         "dropout": breakdown.REST, "grad_norm": "optimizer", "linear": "GEMM", "norm": "norms", "product": "GEMM",
         "rope": breakdown.REST}  # fmt: skip


def kernels_of_ours() -> list[tuple[str, str]]:
    """(source, what a profile calls the kernel): of Triton the function that is launched, of C++ with its arguments."""
    found = []
    for path in sorted((tables.ROOT / "megakern/kernels/triton").glob("*.py")):
        found += [(path.name, name) for name in re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())]
    for path in sorted([*(tables.ROOT / "csrc").glob("*.cu"), *(tables.ROOT / "csrc").glob("*.cuh")]):
        text = re.sub(r"__launch_bounds__\([^)]*\)", "", path.read_text())
        names = re.findall(r"^MK_KERNEL\s+void\s+(\w+\([^)]*\))", text, re.MULTILINE)
        assert len(names) == text.count("\nMK_KERNEL"), path
        found += [(path.name, name) for name in names]
    return found


def test_every_kernel_of_ours_has_the_kind_of_its_op():
    kernels = kernels_of_ours()
    assert len(kernels) > 50
    for source, name in kernels:
        wanted = next(kind for stem, kind in PARTS.items() if source.startswith(stem))
        assert breakdown.kind_of(name) == wanted, f"{source}: {name}"


def test_a_profile_adds_up_to_the_wall_time():
    a = torch.randn(600, 600)
    found = breakdown.breakdown(lambda: torch.mm(a, a).relu_(), steps=3)
    assert sum(found["ms"].values()) == pytest.approx(found["wall_ms"], rel=0.02)
    assert found["ms"]["GEMM"] > found["ms"]["attention"] == 0
    assert "aten::mm" in [name for name, _ in found["longest"]]
    assert breakdown._union([(0, 2), (1, 3), (5, 6)]) == 4


class Made:
    def __init__(self, name, setting):
        if name == "absent":
            raise NotHereError("no such library")
        self.total = setting

    def add(self, value):
        self.total += value
        return self.total

    def leave(self):
        import os

        os._exit(7)


def test_contestants_are_processes_that_tell_what_they_raise():
    here, absent = Contestant(Made, "here", 3), Contestant(Made, "absent", 3)
    try:
        assert here.call("add", 4) == 7 and here.call("add", 1) == 8
        with pytest.raises(FailedError, match="TypeError: unsupported operand"):
            here.call("add", "text")
        with pytest.raises(NotHereError, match="no such library"):
            absent.call("add", 1)
        with pytest.raises(FailedError, match="its process died with code 7"):
            here.call("leave")
    finally:
        here.end()
        absent.end()


def test_a_library_that_writes_over_its_inputs_gets_others():
    """Liger's swiglu does in its backward pass: the contestants after it, and its own next gradient, see ours whole."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, dout):
            x, y = ctx.saved_tensors
            gradients = dout * y, dout * x
            x.fill_(torch.nan), y.fill_(torch.nan)
            return gradients

    inputs = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    before = [x.detach().clone() for x in inputs]
    call = bench_activation.liger_swiglu(*inputs)
    out = call(SimpleNamespace(liger_swiglu=Product.apply), *inputs)
    assert torch.equal(out, before[0] * before[1])
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(gradients[0], before[1]) and torch.equal(gradients[1], before[0])
    assert all(torch.equal(x, value) for x, value in zip(inputs, before, strict=True))


def test_a_library_that_is_not_installed_is_a_reason(monkeypatch):
    assert libraries.why_not("Liger", "cpu") == "runs on NVIDIA GPUs only"
    monkeypatch.setitem(libraries.LIBRARIES, "Liger", ("no_such_module.part", "liger-kernel", True))
    assert libraries.why_not("Liger", "cuda") == "not installed: pip install liger-kernel"
    assert libraries.why_not("transformers", "cpu") in (None, "not installed: pip install transformers")


# --- the command ---


def test_every_op_is_a_part_of_the_suite():
    stems = {path.stem.removeprefix("bench_") for path in (tables.ROOT / "benchmarks").glob("bench_*.py")}
    assert set(test_architecture.OPS) <= set(suite.OPS) <= stems
    assert set(suite.QUICK) | set(suite.PARTS["cpu"]) <= {*stems, "ops"}


def test_parts_share_the_budget():
    assert sum(suite.Suite(kind="cpu").parts.values()) == pytest.approx(1)
    assert suite.Suite(only=("norm", "rope")).parts == {"ops": 1.0}
    assert suite.Suite(only=("norm", "rope")).ops == ("norm", "rope")
    assert suite.Suite(only=("train",)).ops == () and list(suite.Suite(only=("train",)).parts) == ["train"]


def test_a_quick_run_ends_within_three_minutes_whatever_a_part_does(tmp_path, monkeypatch, capsys):
    assert suite.QUICK_SECONDS + suite.QUICK_GRACE <= 180 and sum(suite.QUICK.values()) == pytest.approx(1)
    endless = tmp_path / "python"
    endless.write_text("#!/bin/sh\nsleep 100\n")
    endless.chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(endless))
    monkeypatch.setattr(suite, "QUICK_GRACE", 0.2)
    started = time.monotonic()
    assert suite.run(suite.Suite(only=("growth", "curves"), quick=True, budget=4.0))
    assert time.monotonic() - started < 60
    printed = capsys.readouterr().out
    assert "growth: LEFT OUT, no time left" in printed and "curves: ENDED, no time left" in printed


def test_what_the_suite_says_to_a_part_it_understands():
    for kind, parts in suite.WORDS.items():
        workloads = [workload.name for workload in bench_patch.WORKLOADS[kind]]
        assert list(parts) == ["patch"] and parts["patch"] == ["--workload", workloads[0]]


def test_what_the_command_refuses(tmp_path):
    given = {"quick": False, "out": None, "minutes": None, "backend": None}
    with pytest.raises(ConfigError, match="bench: --only: convolution: no such part; the parts are norm, attention"):
        bench(only=("convolution",), **given)
    with pytest.raises(ConfigError, match="bench: --minutes must be above 0, got -1"):
        bench(only=(), **{**given, "minutes": -1})
    with pytest.raises(ConfigError, match="bench: --backend must be one of cuda, triton, torch, simt, got 'tritn'"):
        bench(only=(), **{**given, "backend": "tritn"})
    with pytest.raises(ConfigError, match=r"the benchmarks are neither in .* nor in .*_suite; install"):
        find_suite(tmp_path / "megakern")
    (tmp_path / "megakern" / "_suite" / "benchmarks").mkdir(parents=True)
    (tmp_path / "megakern" / "_suite" / "benchmarks" / "suite.py").write_text("")
    assert find_suite(tmp_path / "megakern") == tmp_path / "megakern" / "_suite"
