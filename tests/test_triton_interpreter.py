"""Runs `tests/kernels/` in Triton's interpreter, a process a file: the variable that asks for it is read at import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="triton is not installed: pip install -r requirements-dev.txt"
)


# The longest by default only among the long tests.
LONG = ("test_cross_entropy", "test_linear", "test_linear_cross_entropy")


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=pytest.mark.slow if file.stem in LONG else ()) for file in FILES],
    ids=[file.stem for file in FILES],
)
def test_kernels_in_the_interpreter(file, running):
    result = running[file].result()
    assert result.returncode == 0, f"{' '.join(result.args)}\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-500:]


def run(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def running(request):
    """The runs of the files that this session wants, two at a time: each is one thread."""
    wanted = {item.callspec.params["file"] for item in request.session.items if "running" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run, file) for file in FILES if file in wanted}
