"""Finding nvcc, and what an installation builds with it: no compiler is run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megakern import doctor
from megakern.kernels import cuda
from megakern.kernels.cuda import toolkit

ROOT = Path(__file__).resolve().parent.parent


def put_nvcc(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.5'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders for CUDA_HOME, the PATH and site-packages, all empty, and nothing of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv(toolkit.VARIABLE, raising=False)
    monkeypatch.setattr(toolkit, "USUAL", tmp_path / "usual" / "bin" / "nvcc")
    monkeypatch.setattr(toolkit.sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib"), str(tmp_path)))
    monkeypatch.setattr(toolkit, "gpu_present", lambda: True)
    return tmp_path


def test_nvcc_of_cuda_home_then_of_the_path_then_the_usual_place_then_of_a_wheel(places, monkeypatch):
    assert toolkit.find_nvcc() is None
    assert "there is no nvcc on the PATH, in /usr/local/cuda or as a wheel; install" in toolkit.why_not()
    for folder in ("nvidia/cu13", "usual", "path", "home"):
        nvcc = put_nvcc(places / folder)
        if folder == "home":
            monkeypatch.setenv("CUDA_HOME", str(places / folder))
        assert toolkit.find_nvcc() == nvcc
        assert toolkit.release(nvcc) == "13.1"
    assert toolkit.why_not() is None


def test_a_wrong_cuda_home_is_said_and_not_replaced(places, monkeypatch):
    put_nvcc(places / "path")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert toolkit.find_nvcc() is None
    assert "there is no nvcc in CUDA_HOME=/nowhere" in toolkit.why_not()


def test_what_is_built_where(places, monkeypatch):
    put_nvcc(places / "path")
    assert toolkit.archs() is None and toolkit.why_not() is None
    monkeypatch.setattr(toolkit, "gpu_present", lambda: False)
    assert toolkit.why_not() == "this machine has no NVIDIA GPU (MEGAKERN_CUDA_ARCHS=all builds it all the same)"
    monkeypatch.setenv(toolkit.VARIABLE, "90a")
    assert toolkit.archs() == ("90a",) and toolkit.why_not() is None
    monkeypatch.setenv(toolkit.VARIABLE, "80, 90a")
    assert toolkit.archs() == ("80", "90a")
    monkeypatch.setenv(toolkit.VARIABLE, "all")
    assert toolkit.archs() == toolkit.ARCHS
    monkeypatch.setenv(toolkit.VARIABLE, "none")
    monkeypatch.setattr(toolkit, "gpu_present", lambda: True)
    assert toolkit.archs() == () and toolkit.why_not() == "MEGAKERN_CUDA_ARCHS is none"


@pytest.mark.parametrize("wrong", ["hopper", "sm_90", "9.0", "90b"])
def test_a_list_that_names_no_architecture_is_refused(wrong, monkeypatch):
    monkeypatch.setenv(toolkit.VARIABLE, wrong)
    with pytest.raises(ValueError, match=f"must be all, none or a list like 80,90a,100, got '{wrong}'"):
        toolkit.archs()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80, sm_90a, sm_100", (8, 0), True),
        ("sm_80, sm_90a, sm_100", (8, 9), True),  # of one family
        ("sm_80, sm_90a, sm_100", (9, 0), True),
        ("sm_80, sm_90a, sm_100", (12, 0), True),  # by the PTX of the last
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_90a", (8, 0), False),
        ("sm_100", (9, 0), False),
    ],
)
def test_a_gpu_that_the_module_was_not_built_for_is_refused_before_a_launch(archs, capability, runs):
    reason = toolkit.unsuited(f"by nvcc 13.0 for {archs}", capability)
    assert (reason is None) is runs
    if not runs:
        assert f"MEGAKERN_CUDA_ARCHS={toolkit.arch_of(capability)} builds it for that" in reason


def test_the_code_for_one_gpu():
    assert [toolkit.arch_of(capability) for capability in ((8, 0), (9, 0), (10, 0))] == list(toolkit.ARCHS)


def test_an_old_gpu_is_refused():
    assert "8.0 or newer, this GPU has 7.5" in toolkit.unsuited("by nvcc 13.0 for sm_80", (7, 5))


def test_machine_code_for_each_and_portable_code_of_the_last():
    assert toolkit.gencode(("80", "90a", "100")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert toolkit.gencode(("90a",)) == ["-gencode=arch=compute_90a,code=sm_90a"]  # its PTX runs on nothing else


def test_doctor_says_why_there_are_no_kernels(places, monkeypatch):
    monkeypatch.setattr(doctor.machine, "matmul_rate", lambda *arguments: 1.0)
    monkeypatch.setattr(cuda, "_C", None)
    monkeypatch.setattr(cuda, "C_ERROR", "megakern._C is not built")
    monkeypatch.setitem(doctor.UNAVAILABLE, "cuda", "it needs an NVIDIA GPU")  # told once where both reasons are one
    line = "\n  CUDA kernels  megakern._C is not built; "
    assert f"{line}there is no nvcc on the PATH, in /usr/local/cuda or as a wheel; install CUDA's" in doctor.report()
    put_nvcc(places / "usual")
    assert f"{line}install megakern again (pip install -v shows why a build fails)\n" in doctor.report()
    monkeypatch.setattr(toolkit, "gpu_present", lambda: False)
    assert f"{line}this machine has no NVIDIA GPU (MEGAKERN_CUDA_ARCHS=all builds it all the same)\n" in doctor.report()


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_module_that_was_asked_for_and_cannot_be_built_is_an_error():
    asked = run("csrc/build.py", "cuda", CUDA_HOME="/nowhere")
    assert asked.returncode == 1
    assert asked.stderr.startswith("megakern._C: there is no nvcc in CUDA_HOME=/nowhere; install")
    asked = run("csrc/build.py", "cuda", MEGAKERN_CUDA_ARCHS="hopper")
    assert asked.returncode == 1 and "must be all, none or a list" in asked.stderr
    asked = run("csrc/build.py", "gpu")
    assert asked.returncode == 2 and asked.stderr == "usage: python csrc/build.py cuda | simt ...\n"


def test_an_installation_without_nvcc_or_compiler_goes_on_and_says_so(tmp_path):
    folders = ("--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    lean = run("setup.py", "-q", "build_ext", *folders, CUDA_HOME="/nowhere", CXX="/no/c++", CC="/no/cc")
    assert lean.returncode == 0, lean.stderr
    assert "megakern._C is left out: there is no nvcc in CUDA_HOME=/nowhere" in lean.stderr
    assert "megakern._cpu was NOT built" in lean.stderr
    assert not list(tmp_path.rglob("*.so"))
