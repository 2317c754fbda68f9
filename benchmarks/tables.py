"""The tables of README and docs/, and each machine's page of figures, made from the committed results alone.

python -m benchmarks.tables            print them
python -m benchmarks.tables --write    put them between their marks: `goals` in README.md, `speeds`, `faults` in docs/,
                                       and write benchmarks/results/<machine>/README.md, which has every figure
python -m benchmarks.tables --write --faults build/faults.json
                                       the same, after `make faults`: its file becomes one of the results
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXPLAINED = (
    "Figures of ops: the median of turns in one process, from a cold cache; *limit* is the copy or matmul rate of the "
    "same run; *peak memory* is what a call holds beyond its inputs."
)
FAULTS = "faults"  # the one file that holds no speeds


def folders() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def _where(folder: Path, facts: dict) -> str:
    names = ", ".join(str(facts[key]) for key in ("cpu", "gpu") if facts[key])
    return (
        f"**{names}**, {facts['cores']} cores, torch {facts['torch']}, Python {facts['python']} "
        f"(`benchmarks/results/{folder.name}/`)"
    )


def faults() -> str:
    """Markdown of every machine's `make faults`."""
    parts = []
    for folder in folders():
        file = folder / f"{FAULTS}.json"
        if file.exists():
            results = json.loads(file.read_text())
            parts.append(f"{_where(folder, results['machine'])}, {results['seconds'] / 60:.0f} minutes")
            parts.append(_faults_table(results["rows"]))
    return "\n\n".join(parts)


def take(file: Path) -> Path:
    """Makes what `make faults` has written one of the results of its machine, and returns that file.

    Raises SystemExit when there is none, or when the run was broken off.
    """
    if not file.exists():
        raise SystemExit(f"{file} is not there; make it with: make faults")
    results = json.loads(file.read_text())
    if not results["complete"]:
        raise SystemExit(f"{file} is of a run that was broken off after {results['seconds']} s; run make faults again")
    target = folder_of(results["machine"]) / f"{FAULTS}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(file.read_text())
    return target


def folder_of(facts: dict) -> Path:
    """The folder with results of this machine, or a new one named after its processor."""
    same = ("cpu", "gpu", "cores", "isa")
    for folder in folders():
        files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        if any(all(each["machine"].get(key) == facts.get(key) for key in same) for each in files):
            return folder
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"] or facts["cpu"]).lower()).strip("-")
    return RESULTS / f"{name}-{facts['cores']}core"


def _faults_table(rows: list[dict]) -> str:
    lines = ["| id | what | trials | failures | seconds | verdict |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {row['id']} | {row['what']} | {row['trials']:,} | {row['failures']} | {row['seconds']:.0f} "
        f"| {row['verdict']} |"
        for row in rows
    ]
    return "\n".join(lines)


def figures(folder: Path) -> dict[str, dict]:
    """Part or op -> its results of this machine, ops last."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    files.pop(FAULTS, None)
    parts = list(report.TABLES)
    return {name: files[name] for name in sorted(files, key=lambda n: parts.index(n) if n in parts else len(parts))}


def ops_of(files: dict[str, dict]) -> dict[str, dict]:
    return {name: results for name, results in files.items() if name not in report.TABLES}


def goals() -> str:
    """Markdown of every machine that has goals: which hold, and the training step that they are about."""
    parts = []
    for folder in folders():
        files = figures(folder)
        workloads = files.get("train", {}).get("workloads", [])
        sources = [(each.get("name", "a GPT"), each) for each in workloads]
        sources += [("generation", files["generate"])] if "generate" in files else []
        found = [
            {**goal, "what": f"{name}: {goal['what']}"} for name, each in sources for goal in each.get("goals", [])
        ]
        if found:
            parts += [f"{_where(folder, next(iter(files.values()))['machine'])}. [All figures]({_page(folder)})"]
            parts += [report.goals_table(found)]
            parts += [report.startup_table(files["startup"], imports=False)] if "startup" in files else []
            parts += [report.train_table(workloads[0], profile=False, goals=False)] if workloads else []
            parts += [f"![{picture.stem} of {folder.name}]({picture})" for picture in pictures(folder, ("train",))]
    return "\n\n".join(parts)


def speeds() -> str:
    """Markdown of every machine's speeds, machines in the order of their folders' names: ops in a line each."""
    parts = []
    for folder in folders():
        files = figures(folder)
        if not files:
            continue
        facts = next(iter(files.values()))["machine"]
        parts += [f"## {folder.name}", f"{_where(folder, facts)}. [All figures](../{_page(folder)})"]
        for name, table in report.TABLES.items():
            short = functools.partial(table, profile=False) if table is report.workloads_table else table
            parts += [short(files[name])] if name in files else []
        parts += [report.op_summary(ops_of(files))] if ops_of(files) else []
        parts += [f"![{picture.stem} of {folder.name}](../{picture})" for picture in pictures(folder, ("train",))]
    return "\n\n".join(parts)


def _page(folder: Path) -> Path:
    return (folder / "README.md").relative_to(ROOT)


def pictures(folder: Path, names: tuple[str, ...] | None = None) -> list[Path]:
    """The PNG files that plots.py has made of this machine's figures, relative to the project."""
    found = sorted((ROOT / "docs" / "speed" / folder.name).glob("*.png"))
    return [path.relative_to(ROOT) for path in found if names is None or path.stem in names]


def pages() -> dict[Path, str]:
    """File -> text of each machine's page: every figure, the profiles too, and the pictures."""
    found = {}
    for folder in folders():
        files = figures(folder)
        if not files:
            continue
        facts = next(iter(files.values()))["machine"]
        parts = [f"# {folder.name}", f"{_where(folder, facts)}. Made by `python -m benchmarks.tables --write`."]
        parts += [EXPLAINED]
        for name, results in files.items():
            parts.append(f"## {name}\n\nMeasured at commit {results['machine']['commit']}.")
            table = report.TABLES.get(name) or (lambda each: report.op_table(each["rows"]))
            parts.append(table(results))
        parts += [f"![{path.stem}](../../../{path})" for path in pictures(folder)]
        found[folder / "README.md"] = "\n\n".join(parts) + "\n"
    return found


def readers_pages() -> list[Path]:
    """What people read: README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """`text` with every table that has marks in it made anew."""
    for mark, table in (("goals", goals), ("speeds", speeds), (FAULTS, faults)):
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        if begin in text:
            head, rest = text.split(begin)
            text = f"{head}{begin}\n\n{table()}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables where they belong")
    parser.add_argument("--faults", type=Path, metavar="FILE", help="what make faults has written: take it in first")
    options = parser.parse_args()
    if options.faults is not None:
        print(f"{take(options.faults).relative_to(ROOT)} is from {options.faults}")
    if not options.write:
        print(goals(), speeds(), faults(), sep="\n\n")
        return
    write()


def write() -> None:
    """Makes the tables of README and docs/ and the machines' pages anew."""
    for page, text in pages().items():
        page.write_text(text)
    for page in readers_pages():
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
