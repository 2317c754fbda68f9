"""What the examples share: a folder for each, commands that are printed before they run, files of conversations."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments(description: str, name: str) -> argparse.Namespace:
    """--out FOLDER (default: examples/out/NAME, ignored by git) and --short, a minute's version of all steps."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples/out" / name, help="folder for data and run")
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--nproc", type=int, default=1, help="processes, tensor parallel")
    return parser.parse_args()


def megakern(*words: object) -> str:
    """Print the command, run it, show and return what it prints; ends with its exit code when it fails."""
    words = tuple(str(word) for word in words)
    print(f"\n$ megakern {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "megakern", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        shown = []
        for line in process.stdout:
            print(line, end="", flush=True)
            shown.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(shown)


def train(options: argparse.Namespace, config: Path, *settings: object) -> Path:
    """OUT/run, trained on OUT/data; a run that is there already goes on."""
    run = options.out / "run"
    if (run / "config.toml").exists():
        megakern("train", "--resume", run)
        return run
    layout = ["--nproc", options.nproc, "--parallel.tp", options.nproc, "--data.path", options.out / "data"]
    short = ["--train.steps", 4, "--train.save_every", 0, "--train.precision", "fp32"] if options.short else []
    megakern("train", config, "--out", run, *layout, *settings, *short)
    return run


def learn(options: argparse.Namespace, lines: Path, config: Path, *, longest: int, answers: int) -> Path:
    """A model of conversations: a vocabulary of 400, nothing above `longest` tokens, and `answers` of them judged."""
    if not (options.out / "data/manifest.json").exists():
        how = ["--vocab-size", 400, "--longest", longest, "--validation", 0.05]
        megakern("prepare", "--chat", lines, "--out", options.out / "data", *how)
    run = train(options, config)
    megakern("eval", run, "--answers", 20 if options.short else answers)
    return run


def write_lines(path: Path, lines: Iterable[dict]) -> Path:
    """A JSON object a line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
