"""Runs `tests/kernels/` in Triton's interpreter, in processes of its own: the variable that asks for it is read at
import.

Two processes share the files: to start a process, and to import torch and triton in it, takes longer than most files.
"""

from __future__ import annotations

import ast
import collections
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHERS = 'pytestmark = pytest.mark.only("cuda", "simt")'  # a file that says so has no test for Triton
FILES = [
    path for path in sorted((Path(__file__).parent / "kernels").glob("test_*.py")) if OTHERS not in path.read_text()
]
PROCESSES = 2
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install -r requirements-dev.txt"
)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_in_the_interpreter(file, running):
    result, report = running[file].result()
    outcomes = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    finished = [outcome for outcome in outcomes if outcome["outcome"] == "finished"]
    assert finished, f"{' '.join(result.args)}\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    own = [outcome for outcome in outcomes if outcome["id"].startswith(f"tests/kernels/{file.name}")]
    failed = [f"{outcome['id']}: {outcome['line']}" for outcome in own if outcome["outcome"] == "failed"]
    assert not failed, "\n".join([*failed, "", result.stdout[-6000:]])
    count = collections.Counter(outcome["outcome"] for outcome in own)
    assert count["passed"] > 0 and count["skipped"] == 0, count


def test_every_kernel_runs(running):
    """No file has a kernel that none of these tests launches."""
    reports = {future.result()[1] for future in running.values()}
    ran = {name for report in reports for name in notes_beside(report).read_text().split()}
    kernels = launched_kernels(ROOT / "megakern" / "kernels" / "triton")
    assert len(kernels) > 20 and kernels <= ran


def notes_beside(report: Path) -> Path:
    return report.with_suffix(".kernels")


def launched_kernels(folder: Path) -> set[str]:
    """Names of the jitted functions of `folder` that no other one calls."""
    trees = [ast.parse(path.read_text()) for path in folder.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    jitted = [each for each in functions if "triton.jit" in map(_marked, each.decorator_list)]
    called = [ast.unparse(node.func) for each in jitted for node in ast.walk(each) if isinstance(node, ast.Call)]
    return {each.name for each in jitted} - {name.rpartition(".")[2] for name in called}


def _marked(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def run(files: list[Path], report: Path) -> tuple[subprocess.CompletedProcess, Path]:
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-p", "benchmarks.gpu_tests", "--report", str(report), *(str(file) for file in files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment["KERNELS_RAN"] = str(notes_beside(report))
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    return result, report


@pytest.fixture(scope="module")
def running(request, tmp_path_factory):
    """A future for each file that this session wants. The longest file goes to the process that has least so far."""
    own = [item for item in request.session.items if item.path == request.path and "running" in item.fixturenames]
    wanted = {item.callspec.params["file"] for item in own if hasattr(item, "callspec")}
    if len(wanted) < len(own):  # one test wants them all
        wanted = set(FILES)
    shares: list[list[Path]] = [[] for _ in range(PROCESSES)]
    for file in sorted(wanted, key=lambda file: -file.stat().st_size):
        min(shares, key=lambda share: sum(other.stat().st_size for other in share)).append(file)
    folder = tmp_path_factory.mktemp("interpreter")
    with ThreadPoolExecutor(PROCESSES) as pool:
        futures = {}
        for index, share in enumerate(share for share in shares if share):
            future = pool.submit(run, share, folder / f"{index}.jsonl")
            futures |= dict.fromkeys(share, future)
        yield futures
