"""Tuning of Triton kernels: what is measured, when, what is kept on disk. A fake timer, no device."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-dev.txt")

import megakern as mk
import megakern.ops.attention  # which states its problem
from megakern.kernels import triton as backend
from megakern.kernels.triton import attention_configs, configs, tune
from megakern.kernels.triton.launch import recording
from megakern.kernels.triton.tile_config import Choice, Config
from megakern.ops.dispatch import OPS, Problem

A, B, C = (Config(name, {"BM": size}, 4) for name, size in (("a", 16), ("b", 32), ("c", 64)))
CHOICE = Choice((A, B, C), "op fp32 M<=16")
SECONDS = {"a": 3e-6, "b": 1e-6, "c": 2e-6}


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Switches tuning on, for a GPU that does not exist; gives the list of the configurations that were timed."""
    timed: list[str] = []
    last: list[str] = []

    def measure(call):
        last.clear()
        call()
        timed.append(last[-1])
        return SECONDS[last[-1]]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "_identity", lambda: ("NVIDIA H9/000", "3.7.1"))
    monkeypatch.setattr(tune, "_may_measure", lambda anchor: True)
    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "_enabled", False)
    mk.autotune(True)
    yield SimpleNamespace(timed=timed, last=last, file=tmp_path / "megakern" / "NVIDIA-H9-000-triton-3.7.1.json")
    mk.autotune(False)


def ran(tuning, choice=CHOICE, **options) -> str:
    """The name of the configuration that the call itself ran with."""
    tune.run(choice, torch.ones(1), lambda config: tuning.last.append(config.name), **options)
    return tuning.last[-1]


def test_the_first_call_of_a_class_times_all_and_later_ones_take_the_fastest(tuning):
    assert [ran(tuning), ran(tuning)] == ["b", "b"] and tuning.timed == ["a", "b", "c"]
    assert ran(tuning, Choice(CHOICE.options, "another class")) == "b" and len(tuning.timed) == 6
    assert ran(tuning, Choice((C,), "one alone")) == "c" and len(tuning.timed) == 6


def test_off_is_the_table_even_where_something_is_known(tuning):
    ran(tuning)
    mk.autotune(False)
    assert ran(tuning) == "a" and len(tuning.timed) == 3
    assert tune.told(CHOICE) == (A, "")


def test_tuning_is_off_by_default():
    assert tune._enabled is False


def test_what_cannot_run_twice_or_be_measured_now_takes_what_is_known_or_the_table(tuning, monkeypatch):
    assert ran(tuning, repeats=False) == "a"
    monkeypatch.setattr(tune, "_may_measure", lambda anchor: False)
    assert ran(tuning) == "a" and tuning.timed == []
    monkeypatch.setattr(tune, "_may_measure", lambda anchor: True)
    assert ran(tuning) == "b"
    assert ran(tuning, repeats=False) == "b"


def test_no_measurement_on_a_cpu_nor_while_a_graph_is_captured_or_a_model_compiled(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert not tune._may_measure(torch.ones(1))
    with FakeTensorMode():
        assert not tune._may_measure(torch.ones(1, device="cuda"))

    class OnGpu:
        is_cuda = True

    assert not tune._may_measure(OnGpu())  # no plain tensor: a tracer's
    capturing = True
    monkeypatch.setattr(tune.torch, "Tensor", OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert not tune._may_measure(OnGpu())
    capturing = False
    assert tune._may_measure(OnGpu())


def test_the_file_serves_the_next_process_and_is_read_only_once(tuning, monkeypatch):
    ran(tuning)
    assert json.loads(tuning.file.read_text())[CHOICE.key]["b"] == pytest.approx(1.0)
    monkeypatch.setattr(tune, "_known", {})
    assert ran(tuning) == "b" and len(tuning.timed) == 3
    tuning.file.unlink()
    assert ran(tuning) == "b" and len(tuning.timed) == 3


def test_a_changed_configuration_is_measured_again(tuning):
    ran(tuning)
    larger = Config("b", {"BM": 128}, 4)
    assert ran(tuning, Choice((A, larger, C), CHOICE.key)) == "b" and len(tuning.timed) == 6


@pytest.mark.parametrize(
    "content", ["{", "[1, 2]", '{"op fp32 M<=16": 3}', '{"op fp32 M<=16": {"b": "fast"}}', "\x00\xff"]
)
def test_a_damaged_file_is_told_and_replaced(content, tuning, caplog):
    tuning.file.parent.mkdir()
    tuning.file.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "megakern"):
        assert ran(tuning) == "b"
    assert "is not used" in caplog.text or content.startswith('{"op fp32 M<=16": {')
    assert json.loads(tuning.file.read_text())[CHOICE.key]["b"] == pytest.approx(1.0)


def test_a_folder_that_cannot_be_written_is_told_and_memory_serves(tuning, caplog, tmp_path):
    (tmp_path / "megakern").write_text("a file, where a folder should be")
    with caplog.at_level(logging.WARNING, "megakern"):
        assert ran(tuning) == "b"
    assert "kept in memory alone" in caplog.text
    assert ran(tuning) == "b" and len(tuning.timed) == 3


def test_a_configuration_that_cannot_run_is_told_and_never_chosen(tuning, monkeypatch, caplog):
    measure = tune._measure

    def fails(call):
        if measure(call) == SECONDS["b"]:
            raise RuntimeError("out of resource: shared memory")
        return SECONDS[tuning.last[-1]]

    monkeypatch.setattr(tune, "_measure", fails)
    with caplog.at_level(logging.WARNING, "megakern"):
        assert ran(tuning) == "c"
    assert "op fp32 M<=16: configuration 'b' cannot run here: out of resource" in caplog.text


def test_what_another_process_found_in_the_meantime_is_kept(tuning):
    ran(tuning)
    written = json.loads(tuning.file.read_text())
    tuning.file.write_text(json.dumps({**written, "of another process": {"of": ""}}))
    ran(tuning, Choice(CHOICE.options, "another class"))
    assert json.loads(tuning.file.read_text()).keys() == {CHOICE.key, "of another process", "another class"}
    assert [path.name for path in tuning.file.parent.iterdir()] == [tuning.file.name]


def test_explain_says_whether_the_table_or_a_measurement_chose(tuning, monkeypatch):
    problem = Problem("layer_norm", "cuda", torch.bfloat16, {"C": 4096}, {"residual": False})
    assert "the table's, not yet tuned; 16 elements a thread" in backend.configuration(problem)
    choice = configs.OPS["layer_norm"].choices(problem)["forward"]
    for config in choice.options:
        monkeypatch.setitem(SECONDS, config.name, 2e-6 if config is choice.options[0] else 1e-6)
    ran(tuning, choice)
    text = backend.configuration(problem)
    assert "tuned: 1.0 us, 2.00 x as fast as the table's 'forward-row-8'" in text
    mk.autotune(False)
    assert "tuned" not in backend.configuration(problem)


@pytest.mark.parametrize("generation", [8, 9, 10])
def test_a_recording_has_every_configuration_that_may_run(generation):
    from megakern.kernels.triton.linear import product

    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    with recording(generation) as launches:
        product(x, x.t(), torch.empty_like(x))
        expected = configs.product(4096, 4096, 4096, torch.bfloat16).options
    assert [launch.config for launch in launches] == list(expected)
    assert len({config.name for config in expected}) == len(expected) > 1


OF_ATTENTION = [
    ({}, "causal"),
    ({"causal": False}, "full"),
    ({"window": (100, None)}, "window <=128 <=1"),
    ({"window": (None, 4), "causal": False, "softcap": 2.0}, "window any <=4 featured"),
    ({"dropout_p": 0.1, "seed": 1}, "causal featured"),
    ({"packed": True}, "causal packed"),
]


@pytest.mark.parametrize("options, kind", OF_ATTENTION)
def test_classes_of_attention_are_those_that_explain_names(options, kind, monkeypatch):
    """Forward and backward; a changed mask or score is another class, and so is a packed batch."""
    from megakern.kernels.triton import attention

    seen = []
    monkeypatch.setattr(tune, "run", lambda choice, anchor, call, repeats=True: seen.append(choice))
    options = dict(options)
    shape = (300,) if options.pop("packed", False) else (1, 300)
    q, k, v = (torch.empty(*shape, H, 64, dtype=torch.bfloat16, device="meta") for H in (4, 2, 2))
    ends = torch.empty(3, dtype=torch.int32, device="meta") if len(shape) == 1 else None
    left, right = (-1 if side is None else side for side in options.get("window", (None, None)))
    window = (left, 0 if options.get("causal", True) else right)
    how = (ends, ends, None, window, 0.1, options.get("softcap", 0.0), options.get("dropout_p", 0.0), (1, 0, 0), False)
    with recording():
        out, lse = attention.attention_forward(q, k, v, *how)
        attention.attention_backward(out, q, k, v, out, lse, *how)
    problem = OPS["attention"](q, k, v, cu_seqlens=None if ends is None else (ends, ends), **options)
    choices = configs.OPS["attention"].choices(problem)
    assert {choice.key for choice in seen} == {choice.key for choice in choices.values()} and len(seen) == 3
    assert all(choice.key.endswith(f"T<=512 S<=512 {kind}") for choice in seen)
    for role, choice in choices.items():
        listed = attention_configs.ATTENTION[role, 64]
        assert choice.options == tuple(config for config in listed if 9 in config.generations)


def test_names_of_attention_tiles_are_one_configuration_each_on_every_generation():
    """Tuning remembers them by name."""
    for (role, BD), listed in attention_configs.ATTENTION.items():
        for generation in configs.MULTIPROCESSORS:
            names = [config.name for config in listed if generation in config.generations]
            assert names and len(set(names)) == len(names), (role, BD, generation)


def test_the_table_of_attention_launches_each_kernel_with_each_configuration():
    """As far as it goes without a GPU: what is launched, with what."""
    from benchmarks import tune_attention

    with recording() as launches:
        runs, work = tune_attention.calls("1x256x4x2x64", "bf16", device="meta")
        assert work == 2.0 * 4 * 256 * 256 * 64
        for role, call in runs.items():
            for config in tune_attention.candidates(role, 64):
                launches.clear()
                tune_attention.run(role, config, call)
                kernel = "_attention_" + role.replace(" ", "_").replace("-", "_")
                assert [(launch.kernel.__name__, launch.config) for launch in launches] == [(kernel, config)]


def test_the_table_of_cpp_attention_computes_the_same_with_each_configuration(monkeypatch):
    """On the CPU, where the emulator is built: every configuration is another way to the same result."""
    from benchmarks import tune_attention
    from megakern.kernels.cuda import attention, attention_backward, attention_decode
    from megakern.ops.dispatch import UNAVAILABLE

    if UNAVAILABLE["simt"]:
        pytest.skip(UNAVAILABLE["simt"])
    monkeypatch.setattr(tune_attention, "SPLITS", (1, 2, 3))
    monkeypatch.setattr(tune_attention, "CACHES", (8, 64))
    last = {}
    for module, name in ((attention, "attention_forward"), (attention_backward, "attention_backward"),
                         (attention_decode, "decode")):  # fmt: skip
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, run=run: last.update(found=run(*given)) or last["found"])
    for role, shape in (("forward", "1x200x2x1x64:full"), ("backward", "1x200x2x1x128"), ("decode", "2x700x4x2x64")):
        found, work = tune_attention.cuda_calls(role, shape, "bf16", device="cpu")
        results = []
        for _, call in found:
            call()
            results.append(last["found"])
        assert len(found) == {"forward": 8, "backward": 10, "decode": 3}[role] and work > 0
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_what_explain_names_is_what_the_launcher_takes(monkeypatch):
    """The class of problems of both, for each product of a linear layer."""
    from megakern.kernels.triton import linear

    seen = []
    monkeypatch.setattr(tune, "run", lambda choice, anchor, call, repeats=True: seen.append(choice))
    M, N, K = 300, 500, 700
    x, weight = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((M, K), (N, K)))
    with recording():
        dy, _ = linear.linear_forward(x, weight, None, None, "gelu", True)
        linear.linear_input_gradient(dy, weight, None)
        linear.linear_weight_gradient(dy, x, torch.bfloat16, None)
    options = {"activation": "gelu", "residual": False}
    problem = Problem("linear", "cuda", torch.bfloat16, {"M": M, "N": N, "K": K}, options)
    assert seen == list(configs.OPS["linear"].choices(problem).values())
