"""README's tables of speed and of faults, made from the committed results alone.

python -m benchmarks.tables            print them
python -m benchmarks.tables --write    put them into README.md between the `speed` and the `faults` marks
python -m benchmarks.tables --write --faults build/faults.json
                                       the same, after `make faults`: its file becomes one of the results
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from megakern.train.metrics import quantity

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FAULTS = "faults"  # the one file that holds no speeds


def _folders() -> list[Path]:
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
    for folder in _folders():
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
    target = _folder_of(results["machine"]) / f"{FAULTS}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(file.read_text())
    return target


def _folder_of(facts: dict) -> Path:
    """The folder with results of this machine, or a new one named after its processor."""
    same = ("cpu", "gpu", "cores")
    for folder in _folders():
        files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        if any(all(each["machine"][key] == facts[key] for key in same) for each in files):
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


def speeds() -> str:
    """Markdown of every machine's speeds, machines in the order of their folders' names."""
    parts = []
    for folder in _folders():
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        files.pop(FAULTS, None)
        if not files:
            continue
        parts.append(_where(folder, next(iter(files.values()))["machine"]))
        if "train" in files:
            parts.append(_train_table(files.pop("train")))
        if files:
            parts.append(_op_table(files))
    return "\n\n".join(parts)


def _train_table(results: dict) -> str:
    model = ", ".join(f"{name} {value}" for name, value in results["model"].items())
    lines = [
        f"A training step ({model}, batch {results['batch']}; optimizer and clipping included). *plain* is a GPT in",
        "plain PyTorch as nanoGPT trains by default. *floor* is the time of the step's matmuls alone at the matmul",
        "rate measured in the same run.",
        "",
        "| contestant | ms a step | tokens/s | x plain fp32 | floor, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['contestant']} | {row['ms']:.0f} | {row['tokens_per_second']:,.0f} | {row['ratio_to_first']:.2f} "
        f"| {row['matmul_floor_ms']:.0f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines)


def _op_table(files: dict[str, dict]) -> str:
    lines = [
        "Ops (median of turns in one process; *limit* is the copy or matmul rate measured in the same run):",
        "",
        "| op | shape | dtype | pass | us | rate | of limit | x best peer |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for results in files.values():
        groups: dict[tuple, list[dict]] = {}
        for row in results["rows"]:
            groups.setdefault((row["op"], row["shape"], row["dtype"], row["backward"]), []).append(row)
        for (op, shape, dtype, backward), rows in groups.items():
            timed = [row for row in rows if "error" not in row]
            ours = next((row for row in timed if row["contestant"] == "megakern"), None)
            peers = [row for row in timed if not row["contestant"].startswith("megakern")]
            if ours is None or not peers:
                continue
            peer = min(peers, key=lambda row: row["us"])
            lines.append(
                f"| {op} | {shape} | {dtype} | {'backward' if backward else 'forward'} | {ours['us']:.0f} "
                f"| {quantity(ours['rate'], ours['unit'])} | {ours['share_of_limit']:.0%} "
                f"| {peer['us'] / ours['us']:.2f} ({peer['contestant']}) |"
            )
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """`readme` with every table between its marks made anew."""
    for mark, table in (("speed", speeds()), (FAULTS, faults())):
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--faults", type=Path, metavar="FILE", help="what make faults has written: take it in first")
    options = parser.parse_args()
    if options.faults is not None:
        print(f"{take(options.faults).relative_to(ROOT)} is from {options.faults}")
    if not options.write:
        print(speeds(), faults(), sep="\n\n")
        return
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
