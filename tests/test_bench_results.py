"""A machine's folder of results becomes a page, tables of other pages and pictures. No device needed."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_growth, plots, report, tables

MACHINE = {"cpu": "A CPU", "gpu": None, "cores": 2, "torch": "2", "python": "3", "commit": "abc", "date": "2026-01-01"}
TIMED = {"ms": 10.0, "fastest_ms": 9.0, "slowest_ms": 12.0, "tokens_per_second": 1000.0, "peak_bytes": 5e8}
PROFILE = {"ms": {"GEMM": 6.0, "idle": 4.0}, "longest": [["aten::mm", 6.0]], "wall_ms": 10.0}
NAMES = ("plain fp32", "megakern bf16")
PATCHED = ("transformers fp32", "transformers fp32 patched")
PRECISIONS = ("fp32", "bf16")


def results() -> dict[str, dict]:
    """One of each kind, with figures that are easy to find again."""
    label = {"op": "rope", "shape": "3x8", "dtype": "fp32", "backward": False, "rate": 1e9, "unit": "B/s"}
    own = {"ratio_to_first": 1.5, "mfu_causal": 0.41, "mfu_full": 0.45, "matmul_floor_ms": 4.0, "breakdown": PROFILE}
    held = {"what": "bf16", "wanted": 2.0, "reached": 1.5, "against": "plain fp32"}
    spoken = {"tokens_per_second": 20.0, "fastest": 22.0, "slowest": 18.0, "ms_to_first": 50.0, "ratio_to_first": 1.0,
              "same_tokens": 8, "tokens": 8, "peak_bytes": 1e9}  # fmt: skip
    growth = bench_growth.measure_one(bench_growth.GROWTHS[0], (10, 20), 0.0)
    curve = {"mean": 2.0, "lowest": 1.9, "highest": 2.1, "verdict": "yes", "curves": [[3.0, 2.0], [3.1, 2.1]]}
    found = {
        "train": {"workloads": [{
            "name": "a small GPT", "model": {"layers": 2}, "batch": 3, "goals": [held],
            "rows": [{**TIMED, **own, "contestant": name} for name in NAMES]
            + [{"contestant": "Megatron-Core bf16", "missing": "not installed"}],
        }]},
        "generate": {
            "model": "GPT-2", "prompt": 4, "goals": [held],
            "rows": [{**spoken, "contestant": name} for name in NAMES],
        },
        "patch": {"workloads": [{
            "name": "a small Llama", "model": {"layers": 2}, "batch": 3,
            "rows": [{**TIMED, **own, "contestant": name} for name in PATCHED],
        }]},
        "startup": {
            "rows": [{"what": "import torch", "seconds": 1.25, "fastest": 1.0, "slowest": 2.0, "goal": 1.0}],
            "imports": [{"module": "sympy", "ms": 300.0}],
        },
        "curves": {"seeds": 2, "steps": 2, "rows": [{**curve, "contestant": f"megakern {p}"} for p in PRECISIONS]},
        "scaling": {"rows": [{
            **TIMED, "layout": "tp = 2", "processes": 2, "threads": 1, "speedup": 1.8, "efficiency": 0.9,
            "communication_ms": 3.5,
        }]},
        "growth": {"rows": [growth]},
        "rope": {"rows": [
            {**label, "contestant": name, "us": us, "fastest_us": us, "slowest_us": us, "share_of_limit": 0.3}
            for name, us in (("megakern", 10.0), ("torch", 15.0))
        ]},
    }  # fmt: skip
    return {name: {"machine": MACHINE, **each} for name, each in found.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "docs" / "speed")
    made = tmp_path / "results" / "a-machine"
    made.mkdir(parents=True)
    for name, each in results().items():
        (made / f"{name}.json").write_text(json.dumps(each))
    return made


def test_every_kind_of_results_has_tables_and_pictures(folder):
    made = plots.draw(folder)
    drawn = {"train": "megakern bf16", "patch": "transformers fp32 patched", "generate": "plain fp32",
             "curves": "megakern fp32", "scaling": "megakern tp = 2", "growth": "rms_norm", "ops": "rope"}  # fmt: skip
    assert {path.name for path in made} == {f"{name}.{ending}" for name in drawn for ending in plots.ENDINGS}
    assert all(path.stat().st_size > 5000 for path in made if path.suffix == ".png")
    assert all(f">{drawn[path.stem]}" in path.read_text() for path in made if path.suffix == ".svg")  # text is text
    (page,) = tables.pages().values()
    short = tables.speeds()
    shown = ("41.0%", "fp32 patched", "20.0 (18.0 to 22.0)", "1.25 (1.00 to 2.00)", "1.9000 to 2.1000", "tp = 2")
    for text in (*shown, "rms_norm"):
        assert text in page and text in short, text
    assert "not timed: Megatron-Core bf16: not installed" in page
    assert "aten::mm 6.0" in page and "aten::mm 6.0" not in short  # profiles are for the page
    assert "torch 1.50" in page and "1.50 (1.50 to 1.50)" in short  # ops: each shape, and a line an op
    assert page.count("![") == len(drawn) and "Measured at commit abc" in page


def test_pages_get_the_tables_between_its_marks(folder):
    readme, speed = tables.ROOT / "README.md", tables.ROOT / "docs" / "speed.md"
    speed.parent.mkdir(exist_ok=True)
    readme.write_text("a <!-- goals --> stale <!-- /goals --> b")
    speed.write_text("c <!-- speeds --> stale <!-- /speeds --> <!-- faults --> <!-- /faults --> d")
    tables.write()
    for page, begin in ((readme, "a <!-- goals -->"), (speed, "c <!-- speeds -->")):
        written = page.read_text()
        assert written.startswith(begin) and "stale" not in written and report.size(5e8) in written
        assert tables.with_tables(written) == written
    assert "generation: bf16" in readme.read_text() and "tp = 2" not in readme.read_text()  # goals alone
    assert (folder / "README.md").read_text() == tables.pages()[folder / "README.md"]
