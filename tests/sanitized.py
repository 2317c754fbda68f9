"""Tests of the emulator and of the CUDA kernels on the CPU, under a sanitizer of the C++ compiler.

python -m tests.sanitized address [pytest's arguments]    steps outside of tensors, undefined behaviour
python -m tests.sanitized thread [pytest's arguments]     races of CUDA threads that no barrier orders
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TESTS = ["tests/test_simt.py", "tests/test_simt_async.py", "tests/test_gpu_ptx.py", "tests/kernels"]
PLANTED = "missing_barrier"  # the race that a test of the emulator makes on purpose: it would be reported too
OPTIONS = {
    # Python leaks by design; the emulator handles faults in its guard pages itself.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:allow_user_segv_handler=1:handle_segv=0:alloc_dealloc_mismatch=0"},
    "thread": {"TSAN_OPTIONS": "report_bugs=1:halt_on_error=0:exitcode=66:report_signal_unsafe=0:handle_segv=0"},
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}  # before libstdc++, whose throw it wraps


def found(library: str) -> str:
    words = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def module() -> str:
    """megakern._simt with the sanitizer, in a folder of its own."""
    import pybind11

    from tests import simt

    include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    macros = ["-DMEGAKERN_MODULE=_simt", f'-DMEGAKERN_BUILT="with {simt.SANITIZER} sanitizer"']
    sources = [simt.CSRC / "bindings.cpp", *simt.CSRC.glob("*.cu")]
    return str(simt.build_for_cpu(sources, "module-{}/_simt.so", (*include, *macros)))


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in OPTIONS:
        print(__doc__, file=sys.stderr)
        return 2
    sanitizer, arguments = sys.argv[1], sys.argv[2:] or [*TESTS, "-q", "-m", "not slow", "-k", f"not {PLANTED}"]
    os.environ["SIMT_SANITIZER"] = sanitizer
    preload = f"{found(RUNTIMES[sanitizer])} {found('libstdc++.so.6')}"
    environment = os.environ | OPTIONS[sanitizer] | {"LD_PRELOAD": preload}
    if any(word in argument for argument in arguments for word in ("kernels", "module")):
        environment["SIMT_MODULE"] = module()
    # Without address randomisation: ThreadSanitizer wants its own parts of the address space.
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # In files: pytest keeps what a passing test prints to itself, and so a race that no test looks for.
    reports = Path(__file__).resolve().parent.parent / "build" / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    options = f"{sanitizer[0].upper()}SAN_OPTIONS"
    environment[options] += f":log_path={reports / 'report'}"
    if sanitizer == "thread":
        environment[options] += f":suppressions={Path(__file__).with_suffix('.supp')}"
    code = subprocess.run(command, env=environment).returncode
    for report in sorted(reports.iterdir()):
        print(f"\n{report}:\n{report.read_text(errors='replace')}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
