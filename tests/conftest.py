"""Fixtures for all tests. Threads are limited so that tests repeat bit for bit and ranks do not fight over cores."""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

if "SIMT_MODULE" in os.environ:  # another build of megakern._simt, before anything imports it: sanitized.py, planted.py
    _loader = importlib.machinery.ExtensionFileLoader("megakern._simt", os.environ["SIMT_MODULE"])
    _spec = importlib.util.spec_from_loader("megakern._simt", _loader)
    sys.modules["megakern._simt"] = importlib.util.module_from_spec(_spec)
    _loader.exec_module(sys.modules["megakern._simt"])

import pytest
import torch

from megakern.train.files import Files
from tests.checkpoints import UnsyncedFiles
from tests.promises import Promises, trials  # noqa: F401 - a fixture
from tests.ranks import RankPool
from tests.rates import measure_once

torch.set_num_threads(1)
measure_once()


def pytest_addoption(parser):
    parser.addoption("--faults", metavar="FILE", help="write what the tests of promises found to this JSON file")
    parser.addoption("--kernel-backend", metavar="NAME", help="in tests/kernels, the tests of this backend alone")
    parser.addoption(
        "--simt-schedule", metavar="NAME", help="of the emulator in tests/kernels; or each test takes its own"
    )


def pytest_configure(config):
    config.pluginmanager.register(Promises(config.getoption("--faults")), "promises")


LONGEST = (
    "triton_interpreter", "checkpoint_faults", "data_parallel", "verify", "lora", "train_cli", "suite", "masters",
    "trainer", "memory", "faults_ranks", "resume", "saver", "checkpoint_two_ranks",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that with several workers (`pytest -n 3`) none of them is the last one to end."""
    first = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_collection_finish(session):
    """What has been imported stays to the end: collections of garbage, which some tests ask for, need not visit it."""
    gc.freeze()


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(function, size, *arguments)` runs a module-level function on `size` gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A prepared folder of 60 small documents under the byte tokenizer (vocabulary 257)."""
    from megakern.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i:02d}.py").write_text(
            "".join(f"def f{j}(x):\n    return x * {j} + {i}\n" for j in range(5 + i % 7))
        )
    prepare([corpus], folder / "data", tokenizer="bytes", validation_fraction=0.1, progress=False)
    return folder / "data"


@pytest.fixture
def without_fsync(monkeypatch):
    """Saves of this process and its forks do not wait for the disk, which only a power cut can tell: they take most of
    the time of a tiny run that saves each step, and much more beside other writers."""
    monkeypatch.setattr(Files, "sync", UnsyncedFiles.sync)
    monkeypatch.setattr(Files, "sync_folder", UnsyncedFiles.sync_folder)


@pytest.fixture(params=["C++ kernels", "composites"])
def with_and_without_cpu_kernels(request):
    """Runs a test twice: with the C++ kernels where this machine has them, and without."""
    from megakern.kernels.torch import native

    if request.param == "composites" and "ranks" in request.fixturenames:
        pytest.skip("its ranks are other processes, which this switch does not reach")
    if request.param == "composites":
        with native.composites_only():
            yield
    else:
        if native.unavailable() is not None:
            pytest.skip(native.unavailable())
        yield
