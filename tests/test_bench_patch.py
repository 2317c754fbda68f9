"""bench_patch from end to end, with a tiny model. No device needed."""

from __future__ import annotations

import dataclasses
import json

import pytest

import megakern as mk
from benchmarks import bench_patch, bench_train
from benchmarks.bench_train import Workload

pytest.importorskip("transformers", reason="what is patched: pip install megakern[dev]")
TINY = Workload("tiny", dataclasses.replace(mk.presets["tiny-llama"], vocab_multiple=1), 3, bench_patch.HERE)


@pytest.mark.slow
def test_patched_beside_unpatched(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_train.machine, "device_type", lambda: "cpu")
    monkeypatch.setitem(bench_patch.WORKLOADS, "cpu", (TINY,))
    names = ["transformers fp32", "transformers fp32 patched"]
    arguments = ["--only", *names, "--seconds", "1", "--json", str(tmp_path / "patch.json")]
    assert bench_patch.main(arguments) == 0, "a failure, or losses that differ"
    (workload,) = json.loads((tmp_path / "patch.json").read_text())["workloads"]
    assert [row["contestant"] for row in workload["rows"]] == names
    assert all(row["tokens_per_second"] > 0 for row in workload["rows"]) and names[1] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_patch.main(["--workload", "no such thing"])
