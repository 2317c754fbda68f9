"""A code model: the demo's GPT, fine-tuned by adapters to write the body of a Python function from its head.

    make demo                                 # the base; without it a smaller one is trained
    python examples/code_model.py                   # minutes more
    megakern chat examples/out/code_model/run       # say: def area(width, height):

Prompts are heads of functions of Python's own standard library with their docstrings, answers are their bodies.
Low-rank adapters alone learn; printed are the held-out loss of the base and of the adapted model, on the answers.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.shared import ROOT, arguments, megakern, train, write_lines

PACKAGES = ("json", "email", "http", "logging", "unittest", "xml", "importlib", "concurrent", "asyncio", "idlelib")
LONGEST = 700  # characters of a function


def functions(files: list[Path]) -> Iterator[dict]:
    """Heads and bodies of the short functions in these files; methods are moved to the left."""
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.splitlines()
        for node in nodes:
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 1 + (ast.get_docstring(node) is not None):
                continue
            first = node.body[1 if ast.get_docstring(node) is not None else 0]
            head, body = lines[node.lineno - 1 : first.lineno - 1], lines[first.lineno - 1 : node.end_lineno]
            text = "\n".join([*head, *body])
            if head and len(text) <= LONGEST:
                yield {
                    "prompt": "\n".join(line[node.col_offset :] for line in head),
                    "response": "\n".join(line[node.col_offset :] for line in body),
                }


def train_base(out: Path, library: Path, *, short: bool) -> Path:
    """A base of our own, in the demo's way with less of everything."""
    folders = [library / name for name in (PACKAGES[:1] if short else PACKAGES)]
    if not (out / "text/manifest.json").exists():
        how = ["--vocab-size", 512 if short else 2048, "--include", "*.py"]
        megakern("prepare", *folders, *how, "--out", out / "text")
    if (out / "base/config.toml").exists():
        megakern("train", "--resume", out / "base")
    else:
        small = (
            ["--model.width", 64, "--model.vocab_size", 512, "--train.steps", 4, "--train.precision", "fp32"]
            if short
            else []
        )
        config = Path(__file__).with_suffix(".toml")
        megakern("train", config, "--out", out / "base", "--nproc", 1, "--data.path", out / "text", *small)
    return out / "base"


def main() -> None:
    options = arguments(__doc__, "code_model")
    library, out = Path(sysconfig.get_paths()["stdlib"]), options.out
    demo = ROOT / "demo/run"
    ready = (demo / "summary.json").exists() and not options.short
    base = demo if ready else train_base(out, library, short=options.short)
    files = sorted(path for name in PACKAGES for path in (library / name).rglob("*.py"))
    lines = write_lines(out / "functions.jsonl", functions(files[:8] if options.short else files))
    if not (out / "data/manifest.json").exists():
        how = ["--tokenizer", base / "tokenizer.json", "--longest", 257, "--too-long", "skip"]
        megakern("prepare", "--chat", lines, "--out", out / "data", *how)
    megakern("eval", base, "--data", out / "data")
    run = train(options, Path(__file__).with_name("code_model_tune.toml"), "--train.init_from", base)
    megakern("eval", run)
    print(f"\nsay the head of a function: megakern chat {run}")


if __name__ == "__main__":
    main()
