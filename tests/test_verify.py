"""`megakern verify`: right layouts agree, planted bugs are caught and named, wrong input is refused.

Layouts run on the pool of gloo ranks, so that a bug can be planted in them; one test starts the real processes. No
device needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate

import megakern as mk
from megakern.cli import main
from megakern.data.loader import Loader
from megakern.data.manifest import PreparedData
from megakern.layers import dropout as dropout_layer
from megakern.layers import linear as linear_layer
from megakern.layers import parallel_linear, parameter
from megakern.model.gpt import parameter_count
from megakern.train import machine, trainer
from megakern.train.config import load_config
from megakern.verify import processes, synthetic
from megakern.verify.layouts import Layout, default_layouts, no_room, parse_layout
from megakern.verify.reduce import LIMIT, reduce_model
from megakern.verify.report import Report, Row, judge
from megakern.verify.tolerances import ALONE, FLOOR, FP32, Measures, bound_of
from megakern.verify.worker import Distance, run_rank
from tests.commands import Command, finish, start

# --- bugs, each planted on every rank of a layout and never in the reference ---


def bias_on_every_rank(patch):
    """A row-parallel bias added before the reduce: counted R times. It starts at zero, so step 1 is still right."""
    right = linear_layer.RowParallelLinear.forward

    def wrong(self, x, residual=None, **more):
        y = right(self, x, residual, **more)
        return y if self.bias is None else y + (self.region.size - 1) * parameter.local(self.bias).detach()

    patch.setattr(linear_layer.RowParallelLinear, "forward", wrong)


def dropout_by_local_row(patch):
    right = dropout_layer.dropout

    def wrong(x, p, seed, *, row_offset=0, row_blocks=None, residual=None):
        if row_blocks is not None:
            row_offset = 0
        return right(x, p, seed, row_offset=row_offset, residual=residual)

    patch.setattr(dropout_layer, "dropout", wrong)


def no_reduce_in_backward(patch):
    """The input gradient of column-parallel layers stays each rank's part of a sum."""
    right = parallel_linear.start_all_reduce

    class Done:
        def __init__(self, x):
            self.x = x

        def wait(self):
            return self.x

    def wrong(x, group):
        in_backward = torch._C._current_graph_task_id() != -1
        return Done(x) if in_backward else right(x, group)

    patch.setattr(parallel_linear, "start_all_reduce", wrong)


def unfinished_gradients(patch):
    """Norm gradients under sequence parallelism are taken for whole, each rank with its own tokens' part."""

    def wrong(params):
        for p in params:
            if any(placement.is_partial() for placement in p.grad.placements):
                p.grad = DTensor.from_local(p.grad.to_local(), p.grad.device_mesh, [Replicate()], run_check=False)

    patch.setattr(trainer, "finish_gradients", wrong)


def weights_by_local_index(patch):
    """Each rank draws its slice as if it began at the first element of the whole."""
    right = parameter.fill_normal

    def wrong(values, key, std, *, full_shape, offsets):
        right(values, key, std, full_shape=full_shape, offsets=tuple(0 for _ in offsets))

    patch.setattr(parameter, "fill_normal", wrong)


def no_bug(patch):
    pass


def run_planted(folder: Path, bug) -> None:
    """What a process of `megakern verify` does, on a rank of the pool."""
    settings = load_config(folder / "config.toml").parallel
    sizes = {"tp": settings.tp, "dp": settings.dp, "replicas": settings.replicas}
    parallel = mk.ParallelContext.create(**sizes, sequence_parallel=settings.sequence_parallel)
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        run_rank(folder, parallel)


@pytest.fixture
def verify(ranks, monkeypatch, capsys, tmp_path):
    """`verify(bug, *words)` -> (exit code, what was printed, the JSON)."""

    def run(bug, *words: object) -> tuple[int, str, dict]:
        def on_pool(folder: Path, count: int) -> None:
            ranks.run(run_planted, count, folder, bug)

        monkeypatch.setattr(processes, "run_processes", on_pool)
        capsys.readouterr()
        target = tmp_path / "report.json"
        code = main(["verify", "--json", str(target), *map(str, words)])
        return code, capsys.readouterr().out, json.loads(target.read_text())

    return run


# --- what agrees ---


@pytest.mark.parametrize("preset", ["tiny-llama", pytest.param("tiny-gpt2", marks=pytest.mark.slow)])
def test_right_layouts_agree(verify, preset):
    code, output, report = verify(no_bug, "--preset", preset, "--steps", 2)
    assert code == 0, output
    assert output.splitlines()[-1] == f"all {len(report['rows'])} runs agree with the reference"
    layouts = [str(layout) for layout in default_layouts(mk.presets[preset])]
    expected = [(layout, precision) for precision in ("fp32", "bf16") for layout in ("tp=1", *layouts)][1:]
    assert [(row["layout"], row["precision"]) for row in report["rows"]] == expected
    assert "dropout 0.1; 2 steps of 4 x 64 tokens of made-up text" in output


def test_the_table_and_the_json_say_the_same(verify):
    code, output, report = verify(no_bug, "--steps", 2, "--layouts", "tp=2", "tp=8", "--precisions", "fp32",
                                  "--model.kv_heads", 8, "--model.heads", 8)  # fmt: skip
    assert code == 0 and report["passed"] is True
    head, *lines = [line for line in output.splitlines() if not line.startswith(("model:", "all "))]
    assert head.split()[:4] == ["layout", "proc", "precision", "backend"]
    assert len(lines) == len(report["rows"]) == 2
    first, second = report["rows"]
    cells = lines[0].split()
    assert cells[:4] == ["tp=2", "2", "fp32", "torch"] and cells[-1] == first["verdict"] == "agrees"
    assert f"{first['distance']['loss']:.0e} < {FP32.loss:.0e}" in lines[0]
    assert f"{first['worst_parameter']} {first['distance']['parameter']:.0e} < {FP32.parameter:.0e}" in lines[0]
    assert first["tolerance"] == vars(FP32) and len(first["losses"]) == 2
    assert second["verdict"] == "not run" and second["distance"] is None and "8 processes" in second["reason"]
    assert "not run: it needs 8 processes" in lines[1] and "(1 not run)" in output


def test_real_processes_and_a_run_with_its_own_data(tiny_data, tmp_path):
    config = tmp_path / "config.toml"
    settings = {"preset": '"tiny-gpt2"', "vocab_size": 257, "sequence_length": 32, "dropout": 0.1}
    model = "\n".join(f"{key} = {value}" for key, value in settings.items())
    config.write_text(f'[model]\n{model}\n[data]\npath = "{tiny_data}"\n[train]\nbatch = 8\nmicro_batch = 4\n')
    words = ["--steps", "2", "--layouts", "tp=2,dp=2,sp", "--precisions", "fp32"]
    output = finish(start("verify", config, *words))
    assert f"tokens of {tiny_data}" in output and "all 1 runs agree" in output
    assert "redistributing" not in output, "PyTorch's warnings about gathers of tp with dp are for others"


# --- what must be caught ---

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("bug", "layout", "precision", "message"),
    [
        pytest.param(bias_on_every_rank, "tp=2", "fp32", r"the loss differs from step 2 on, by \d", marks=SLOW),
        (dropout_by_local_row, "tp=2,sp", "fp32", r"the loss differs from step 1 on, by \d"),
        pytest.param(
            dropout_by_local_row, "tp=2,sp", "bf16",
            r"the gradient of step 1 differs, most in [\w.]+: by \d",
            marks=SLOW,
        ),
        (no_reduce_in_backward, "tp=2", "fp32", r"the gradient of step 1 differs, most in [\w.]+: by \d"),
        pytest.param(
            no_reduce_in_backward, "tp=2", "bf16",
            r"the gradient of step 1 differs, most in [\w.]+: by \d",
            marks=SLOW,
        ),
        (unfinished_gradients, "tp=2,sp", "fp32", r"the gradient of step 1 differs, most in [\w.]*(norm|bias|pos)"),
        pytest.param(
            weights_by_local_index, "tp=2", "fp32",
            r"the initial weights are not .* bit for bit: embedding.weight",
            marks=SLOW,
        ),
    ],
)  # fmt: skip
def test_a_planted_bug_is_caught_and_named(verify, bug, layout, precision, message):
    words = ["--preset", "tiny-gpt2", "--steps", 2, "--layouts", layout, "--precisions", precision]
    code, output, report = verify(bug, *words)
    row = report["rows"][-1]
    assert code == 1 and report["passed"] is False and row["verdict"] == "differs", output
    assert row["layout"] == layout and row["precision"] == precision
    assert re.search(message, row["reason"]), row["reason"]
    assert f"{layout} {precision} torch: {row['reason']}" in output.splitlines()
    assert output.splitlines()[-1].startswith(f"1 of {len(report['rows'])} runs do not agree")


def test_a_rank_that_fails_is_a_row(monkeypatch, capsys):
    def fails(folder, count):
        raise processes.LayoutError("rank 1 of 2: ValueError: planted")

    monkeypatch.setattr(processes, "run_processes", fails)
    assert main(["verify", "--steps", "1", "--layouts", "tp=2", "--precisions", "fp32"]) == 1
    assert "tp=2 fp32 torch: rank 1 of 2: ValueError: planted" in capsys.readouterr().out


def refuse(folder: Path, count: int, fork: bool) -> int:
    processes.can_fork = lambda: fork
    with pytest.raises(processes.LayoutError) as error:
        processes.run_alone(folder) if count == 1 else processes.run_processes(folder, count)
    print(error.value)
    return 0


@pytest.mark.parametrize(
    ("count", "fork", "message"),
    [(2, True, r"rank \d of 2: ValueError: unknown backend 'none'"), (1, True, "ValueError: unknown backend 'none'"),
     (1, False, "ValueError: unknown backend 'none'")],
)  # fmt: skip
def test_processes_name_the_rank_that_failed_and_leave_none(tmp_path, count, fork, message):
    """Real processes, with a job that every rank refuses."""
    (tmp_path / "config.toml").write_text(f"[parallel]\ntp = {count}\n[model]\npreset = 'tiny-gpt2'\n")
    (tmp_path / "job.json").write_text(json.dumps({"steps": 1, "backend": "none", "reference": None}))
    assert re.match(message, finish(Command(refuse, tmp_path, count, fork)))


def die(folder: Path) -> int:
    processes.run_rank = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(processes.LayoutError, match=r"^rank 0 of 1 died by SIGKILL$"):
        processes.run_alone(folder)
    return 0


def test_a_process_that_dies_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("[model]\npreset = 'tiny-gpt2'\n")
    finish(Command(die, tmp_path))


# --- measures, without any run ---


def test_distance_is_that_of_float64():
    generator = torch.Generator().manual_seed(0)
    reference = {name: torch.randn(n, generator=generator) for name, n in (("a", 3), ("b", 50))}
    values = {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in reference.items()}
    distance = Distance()
    for name, value in values.items():
        distance.add(name, value, reference[name])
    flat, expected = (torch.cat([*each.values()]).double() for each in (values, reference))
    assert distance.relative() == pytest.approx((torch.dist(flat, expected) / expected.norm()).item(), rel=1e-12)
    each = {name: (torch.dist(values[name], reference[name]) / reference[name].norm()).item() for name in values}
    name = max(each, key=each.get)
    assert distance.worst() == (name, pytest.approx(each[name], rel=1e-6))


def test_a_gradient_that_is_only_rounding_is_measured_against_its_share():
    distance = Distance()
    distance.add("weight", torch.ones(1000), torch.ones(1000))
    distance.add("key.bias", torch.full((10,), 1e-8), torch.full((10,), -1e-8))
    assert distance.worst() == ("key.bias", pytest.approx(2e-8 / 1e-3, rel=1e-2))


def test_nan_is_worst_and_agrees_with_nothing():
    distance = Distance()
    distance.add("a", torch.tensor([float("nan")]), torch.ones(1))
    distance.add("b", torch.tensor([9.0]), torch.ones(1))
    assert distance.worst()[0] == "a" and math.isnan(distance.worst()[1])
    result = {"losses": [1.0, None], "norms": [1.0, 1.0], "initial": None, "gradient": 0.0, "worst": "a",
              "parameter": 0.0, "update": 0.0}  # fmt: skip
    names = {"layout": "tp=2", "processes": 2, "precision": "fp32", "backend": "torch"}
    row = judge(result, {"losses": [1.0, 1.0], "norms": [1.0, 1.0]}, FP32, **names)
    assert row.verdict == "differs" and row.reason.startswith("the loss differs from step 2 on")
    assert json.loads(Report(notes=(), rows=(row,)).as_json())["rows"][0]["distance"]["loss"] is None


def test_a_skipped_first_step_and_a_norm_that_drifts_have_their_own_reasons():
    names = {"layout": "tp=2", "processes": 2, "precision": "fp16", "backend": "torch"}
    reference = {"losses": [1.0, 1.0], "norms": [1.0, 1.0]}
    result = {"losses": [1.0, 1.0], "norms": [None, 1.0], "initial": None}
    row = judge(result, reference, FP32, **names)
    assert (row.verdict, row.reason) == ("failed", "the gradient of step 1 is not finite, so it was skipped")
    result = {**result, "norms": [1.0, 1.1], "gradient": 0.0, "worst": "a", "parameter": 0.0, "update": 0.5}
    row = judge(result, reference, FP32, **names)
    assert (
        row.reason
        == "the gradient norm differs from step 2 on; the weights after step 2 differ by 5.0e-01 of the way they went"
    )


def test_the_bound_of_a_layout_is_twice_one_process_and_a_floor():
    alone = Measures(loss=1e-3, gradient=2e-2, parameter=0.1, update=0.2)
    assert bound_of("fp32", alone) is FP32 and bound_of("bf16", None) is ALONE["bf16"]
    floor = FLOOR["bf16"]
    assert bound_of("bf16", alone) == Measures(
        loss=2e-3 + floor.loss,
        gradient=4e-2 + floor.gradient,
        parameter=0.2 + floor.parameter,
        update=0.4 + floor.update,
    )


def test_nothing_that_ran_is_no_pass():
    row = Row(layout="tp=8", processes=8, precision="fp32", backend="torch", verdict="not run", reason="r")
    report = Report(notes=(), rows=(row,))
    assert not report.passed and report.conclusion().startswith("nothing was compared")


# --- the reduced model ---


@pytest.mark.parametrize("name", [name for name, model in mk.presets.items() if parameter_count(model) > LIMIT])
def test_a_reduced_preset_keeps_what_layouts_meet(name):
    model = dataclasses.replace(mk.presets[name], window=500, dropout=0.1, parallel_residual=True)
    tps = [tp for tp in (1, 2, 4) if model.key_value_heads % tp == 0]
    small = reduce_model(model, tps)
    assert parameter_count(small) < LIMIT / 2
    kept = ("norm", "activation", "positions", "bias", "qkv_bias", "qk_norm", "tied_embeddings", "parallel_residual",
            "dropout", "vocab_multiple", "norm_eps", "rope_base")  # fmt: skip
    assert {key: getattr(small, key) for key in kept} == {key: getattr(model, key) for key in kept}
    assert small.heads // small.key_value_heads == model.heads // model.key_value_heads
    assert small.layers == 2 and small.window < small.sequence_length
    assert small.heads * small.size_of_head / small.width == pytest.approx(
        model.heads * model.size_of_head / model.width, rel=0.01
    )
    assert small.size_of_ffn / small.width == pytest.approx(model.size_of_ffn / model.width, rel=0.35)
    for tp in tps:
        small.check_tensor_parallel(tp)
        assert small.sequence_length % tp == 0
    assert reduce_model(model, tps, keep_vocabulary=True).vocab_size == model.vocab_size


def test_a_large_model_is_reduced_and_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(processes, "run_processes", lambda *_: (_ for _ in ()).throw(processes.LayoutError("stop")))
    main(["verify", "--preset", "gpt2-124m", "--steps", "1", "--precisions", "fp32", "--layouts", "tp=2"])
    output = capsys.readouterr().out
    assert "reduced from 124.4 to 0.2 million parameters: layers 12 -> 2, width 768 -> 64" in output
    assert "--full-size keeps it" in output and "model: 0" not in output


def test_made_up_text_covers_the_vocabulary_and_can_be_learned(tmp_path):
    synthetic.write_synthetic(tmp_path / "data", vocab_size=50, tokens=5000, seed=1)
    data = PreparedData(tmp_path / "data")
    data.verify()
    tokens, targets = Loader(data.train, 64, 1, vocab_size=50).batch(0, 40)
    assert set(tokens.flatten().tolist()) == set(range(50))
    strides = (targets - tokens) % 50
    assert 0.7 < ((strides >= 1) & (strides <= 3)).double().mean() < 0.95


# --- layouts, and wrong input ---


def test_default_layouts_fit_model_and_machine(monkeypatch):
    model = mk.presets["tiny-llama"]  # two KV heads
    monkeypatch.setattr(machine, "cores", lambda: 64)
    two = ["tp=2", "tp=2,sp", "dp=2", "tp=2,dp=2", "tp=2,dp=2,sp", "dp=4"]
    assert [str(layout) for layout in default_layouts(model)] == two
    four = dataclasses.replace(model, kv_heads=4, sequence_length=62)
    assert [str(layout) for layout in default_layouts(four)] == [*two[:2], "tp=4", *two[2:]]
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert max(layout.processes for layout in default_layouts(four)) == 2


def test_a_layout_needs_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert no_room(Layout(tp=2)) == "it needs 2 GPUs, one a process, and there are 1"
    assert no_room(Layout()) is None


@pytest.mark.parametrize("text", ["tp=1", "tp=2", "tp=2,dp=3,sp,zero=3", "dp=2,zero=2", "tp=16,sp"])
def test_layouts_are_written_as_they_are_read(text):
    assert str(parse_layout(text)) == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "tp=2,zp=2"], r"--layouts: 'zp=2' of 'tp=2,zp=2' is none of tp=N.*write layouts like"),
        (["--layouts", "tp=0"], r"'tp=0' of 'tp=0' is none of"),
        (["--layouts", "tp=2,tp=2"], r"'tp=2,tp=2' has tp twice"),
        (["--layouts", "dp=2,sp"], r"'dp=2,sp': sp needs tp=2 or more"),
        (["--layouts", "dp=2,zero=4"], r"'dp=2,zero=4': zero must be 1, 2 or 3"),
        (["--layouts", "tp=2,zero=3"], r"'tp=2,zero=3': zero needs dp=2 or more"),
        (["--layouts", "tp=4"], r"layout tp=4: model.kv_heads = 2 is not divisible by parallel.tp = 4"),
        (["--layouts", "tp=2,sp", "--model.sequence_length", "31"], r"layout tp=2,sp: model.sequence_length = 31 is"),
        (["--precisions", "fp8"], r"--precisions: 'fp8' is none of fp32, bf16, fp16"),
        (["--backends", "fast"], r"--backends: 'fast' is none of auto, cuda"),
        (["--backends", "cuda"], r"--backends: cuda cannot be used here: .*GPU"),
        (["--steps", "0"], r"--steps must be 1 or more, got 0"),
        (["--preset", "tiny"], r"unknown preset 'tiny'; did you mean 'tiny-"),
        (["nowhere.toml"], r"nowhere.toml: there is no such configuration file"),
        (["nowhere.toml", "--preset", "demo"], r"name nowhere.toml or --preset demo, not both"),
        (["--model.widht", "3"], r"unknown key 'model.widht'; did you mean"),
        (["--json", "nowhere/file.json"], r"--json: there is no folder nowhere"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_runs(words, message, monkeypatch, capsys):
    def started(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(processes, "run_alone", started)
    monkeypatch.setattr(processes, "run_processes", started)
    assert main(["verify", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megakern: ") and re.search(message, error), error
