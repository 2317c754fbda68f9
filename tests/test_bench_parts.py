"""The parts of `megakern bench` beside ops and training steps: each finds what it is there to find. No device."""

from __future__ import annotations

import sys
import time

import pytest
import torch

import megakern as mk
from benchmarks import bench_attention, bench_curves, bench_generate, bench_growth, bench_scaling, bench_startup, report
from benchmarks.bench_growth import Growth
from benchmarks.bench_train import gpt2


def test_kinds_of_attention_count_what_queries_see():
    kinds = {"": 50, "full": 100, "window=3": 1 + 2 + 3 + 7 * 4, "window=40": 55, "deterministic": 50}
    for text, pairs in kinds.items():
        kind = bench_attention.Kind.of(text)
        assert kind.visible(10) == pairs and kind.deterministic == (text == "deterministic")
        if kind.window is not None:
            assert kind.mask(10, "cpu").sum() == pairs
    assert bench_attention.Kind.of("full,deterministic") == bench_attention.Kind(causal=False, deterministic=True)
    for wrong in ("window", "causal", "full,window=3"):
        with pytest.raises(ValueError, match="is of full or window=N, and deterministic; got"):
            bench_attention.Kind.of(wrong)


def quadratic(n: int):
    def call():
        return sum(i != j for i in range(n) for j in range(n))

    return call


def square(n: int):
    x = torch.ones(n)
    return lambda: x[:, None] * x[None]


def test_a_quadratic_op_is_flagged():
    row = bench_growth.measure_one(Growth("planted", "n", quadratic, (30, 300)), (30, 300), 0.0)
    assert row["verdict"].startswith("TIME grows by") and row["last_exponent"] > 1.5, row
    row = bench_growth.measure_one(Growth("planted", "n", square, (100, 1000), expected=9), (100, 1000), 0.0)
    assert row["verdict"] == "MEMORY grows by 2.00", row  # 4 MB at the end
    assert "MEMORY grows by 2.00" in report.growth_table({"rows": [row]})
    assert bench_growth.measure_one(Growth("honest", "n", quadratic, (30, 300), 2.0), (30, 300), 0.0)["expected"] == 2


def test_exponents_are_those_of_the_formula():
    sizes = (10, 100, 1000)
    assert bench_growth.slopes(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx((1.5, 1.5))
    fixed = bench_growth.slopes(sizes, [50 + n for n in sizes])  # a fixed cost hides the exponent of small sizes
    assert fixed[0] < fixed[1] < 1


def test_every_growth_can_be_made():
    """At the smallest size; the exponents are for a quiet machine."""
    for growth in bench_growth.GROWTHS:
        smallest = growth.make(10)
        smallest()


def test_curves_are_judged_by_the_spread_of_the_seeds():
    falling = [5.0 - 0.03 * step for step in range(100)]
    runs = [[loss + shift for loss in falling] for shift in (-0.1, 0.0, 0.1)]
    assert bench_curves.judge([[loss + 0.05 for loss in falling]] * 3, runs) == "yes"
    late = [loss + (0.2 if step >= 80 else 0.0) for step, loss in enumerate(falling)]
    assert bench_curves.judge([late] * 3, runs) == "no: outside in 2 of 10 parts"


def test_a_curve_is_a_function_of_its_seed(monkeypatch):
    small = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 256, "vocab_multiple": 1, "sequence_length": 8}
    monkeypatch.setattr(bench_curves, "MODEL", small)
    corpus, cpu = bench_curves.text(), torch.device("cpu")
    assert b"import" in bytes(corpus[:100_000].to(torch.uint8).tolist())
    first, again = (bench_curves.curve("fp32", 1, 4, corpus, cpu) for _ in range(2))
    assert first == again != bench_curves.curve("fp32", 2, 4, corpus, cpu)
    assert bench_curves.curve("bf16 split", 1, 4, corpus, cpu) == pytest.approx(first, rel=0.01)


def test_all_generate_the_same_tokens(monkeypatch):
    monkeypatch.setattr(bench_generate.machine, "cores", lambda: 1)
    pytest.importorskip("transformers", reason="a peer of this comparison: pip install megakern[dev]")
    config = gpt2("tiny-gpt2", vocab_size=250, sequence_length=64)
    made = {name: bench_generate.Generation(name, config) for name in bench_generate.CONTESTANTS}
    _, expected = made["transformers fp32"].run(12)
    assert len(expected) == 12 and len(set(expected)) > 1
    assert made["megakern fp32"].run(12)[1] == expected
    for name in ("transformers bf16", "megakern bf16"):
        assert len(made[name].run(3)[1]) == 3


def test_a_goal_of_generation_says_when_memory_is_too_slow_for_it():
    config = gpt2("gpt2-124m")
    learned = sum(p.numel() for p in mk.GPT(config, device="meta").parameters())
    assert bench_generate.bytes_a_token("megakern bf16", config) == 2 * (learned - 1024 * 768)
    reached = {"what": "what", "wanted": 2.0, "reached": 1.5, "against": "a peer"}
    ours = {"bytes_a_token": 500_000_000, "of_read_rate": 0.9}
    assert bench_generate.with_limit(reached, {**ours, "of_read_rate": 0.5}, 28e9) == reached
    limited = bench_generate.with_limit(reached, ours, 28e9)
    assert "no; at most 1.67: 500 MB of weights a token at 28 GB/s" in report.goals_table([limited])
    assert bench_generate.read_rate(torch.ones(1000)) > 0


def test_a_start_is_timed_to_its_end_and_its_failure_is_told(tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(0.2)"]
    assert bench_startup.seconds_to_first_step(sleeps, tmp_path, 0) > 0.2
    with pytest.raises(RuntimeError, match="ended with code 1: no such setting"):
        bench_startup.seconds_to_first_step([sys.executable, "-c", "raise SystemExit('no such setting')"], tmp_path, 1)


@pytest.mark.slow
def test_runs_are_started_and_timed():
    results = bench_startup.measure(time.monotonic(), 1)
    assert [row["turns"] for row in results["rows"]] == [1] * 5 and all(row["seconds"] > 0 for row in results["rows"])
    assert "megakern train, demo, 2 processes" in report.startup_table(results)


@pytest.mark.slow
def test_layouts_are_timed_on_the_same_work():
    shape = {**bench_scaling.MODEL, "layers": 1, "width": 64, "heads": 2, "sequence_length": 32}
    results = bench_scaling.measure(shape, 1, time.monotonic() + 300)
    rows = {row["layout"]: row for row in results["rows"]}
    assert (
        rows["tp = 2"]["processes"] == 2
        and rows["tp = 2"]["communication_ms"] > 0 == rows["1 core"]["communication_ms"]
    )
    assert rows["1 core"]["efficiency"] == 1
    assert "tp = 2, sequence parallel" in report.scaling_table(results)
    assert rows["tp = 2"]["transport"] == "shared memory" and rows["tp = 2"]["all_reduce_ms"]["float32"] > 0
    assert rows["tp = 2, gloo"]["transport"].startswith("gloo: MEGAKERN_SHARED_MEMORY=0")
    assert rows["tp = 2, gloo"]["loss"] == rows["tp = 2"]["loss"]
