"""The shape of the project holds: one-way imports, short files, all files of each op, a true file tree in README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megakern"

# A package may import those to its right of the arrow, and itself. `config` and `parallel` are leaves.
MAY_IMPORT = {
    "config": set(),
    "parallel": {"_cpu"},  # compiled; collectives through shared memory
    "kernels": {"_cpu", "_C", "_simt", "parallel"},  # compiled; a kernel that is split over ranks holds collectives
    "ops": {"kernels", "parallel"},
    "layers": {"ops", "parallel", "config"},
    "model": {"layers", "ops", "parallel", "config"},
    "data": {"config"},
    "train": {"model", "layers", "ops", "data", "parallel", "config", "__init__"},
}
HARD_LIMIT = 600


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The sub-packages of megakern that a module imports, type-checking blocks included."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "megakern":
                names = [f"megakern.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("megakern.")}
    return {"__init__" if name.startswith("__") else name for name in found}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = package_of(path)
    if package not in MAY_IMPORT:  # cli, doctor ...: the top, may import everything
        return
    upward = imported(ast.parse(path.read_text())) - MAY_IMPORT[package] - {package}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)} of megakern: against the flow"


def test_every_package_is_in_the_table():
    commands = {"doctor", "evaluate", "evaluate_harness", "scoring", "verify", "plan", "bench", "convert", "serve"}
    top = {"__init__", "__main__", "cli", "inference", "patching", "scoring", "evaluate_harness", *commands}
    assert {package_of(path) for path in modules()} == set(MAY_IMPORT) | top


def sources() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    endings = (".py", ".cu", ".cuh", ".h", ".cpp")
    return [ROOT / name for name in listed if name.endswith(endings) and (ROOT / name).exists()]


def test_no_source_file_is_longer_than_the_limit():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    long = {name: length for name, length in lengths.items() if length > HARD_LIMIT}
    assert not long, f"split these by what they are about: {long}"


# Stems of megakern/ops that hold an op. The others are shared: dispatch, checks.
OPS = sorted(
    path.stem for path in (PACKAGE / "ops").glob("*.py") if "from megakern.ops.dispatch import" in path.read_text()
)


@pytest.mark.parametrize("stem", OPS)
def test_every_op_has_all_its_files(stem):
    wanted = [f"megakern/kernels/torch/{stem}.py", f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    missing = [name for name in wanted if not (ROOT / name).exists()]
    assert not missing, f"op {stem} lacks {missing}"
    text = "".join(path.read_text() for path in (PACKAGE / "ops").glob(f"{stem}*.py"))
    assert re.search(r"^def \w+_reference\(", text, re.M), f"op {stem} has no *_reference"


def test_environment_variables_are_documented():
    page = (ROOT / "docs" / "training.md").read_text()
    pattern = re.compile(r"""environ(?:\.get\(|\[)\s*["']([A-Z_0-9]+)["']|["'](MEGAKERN_[A-Z_]+)["']""")
    used = {a or b for path in modules() for a, b in pattern.findall(path.read_text())}
    missing = sorted(name for name in used if f"`{name}`" not in page)
    assert not missing, f"the table in docs/training.md of environment variables lacks {missing}"


def test_import_needs_no_gpu_no_triton_and_no_time():
    program = (
        "import sys, megakern\n"
        "assert 'torch' not in sys.modules, 'importing megakern loads torch before it is used'\n"
        "sys.modules['triton'] = None  # any import of it fails from here on\n"
        "for name in megakern.__all__: getattr(megakern, name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_run_starts_without_the_compiler():
    """torch._dynamo takes half a second of each start, and nothing of a run in eager mode needs it."""
    program = "import sys, megakern.train.worker, megakern.cli\nassert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_readme_file_tree_is_true():
    """Every path in README's tree exists, and every folder with sources in it."""
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- tree -->")[1].split("```")[1]
    listed = {line.split(" ")[0] for line in block.strip().splitlines()}
    absent = sorted(name for name in listed if not (ROOT / name).exists())
    assert not absent, f"in README's tree and not in the project: {absent}"
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.cu", "*.cpp"], cwd=ROOT, capture_output=True, text=True)
    folders = {f"{Path(name).parent}/" for name in tracked.stdout.split()} - {"./"}
    assert folders and not folders - listed, f"not in README's tree: {sorted(folders - listed)}"


def test_ops_are_known_before_their_first_use():
    """`import megakern` loads no op; names of ops are still right, and wrong ones refused, at the first call of all."""
    program = (
        "import megakern as mk\n"
        "with mk.use_backend('torch', op='attention'): pass\n"
        "from megakern.ops.dispatch import ops_of\n"
        "assert {'rms_norm', 'AdamW', 'dropout'} <= set(ops_of('torch')), ops_of('torch')\n"
        "try: mk.explain('attentoin')\n"
        "except ValueError as error: assert 'rope' in str(error), error\n"
        "else: raise AssertionError('a wrong name was accepted')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
