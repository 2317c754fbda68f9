"""README's speed tables, made from the committed results alone.

python -m benchmarks.tables            print them
python -m benchmarks.tables --write    put them into README.md between the `speed` marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megakern.train.metrics import quantity

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"


def tables() -> str:
    """Markdown of every machine's results, machines in the order of their folders' names."""
    parts = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        facts = next(iter(files.values()))["machine"]
        where = ", ".join(str(facts[key]) for key in ("cpu", "gpu") if facts[key])
        parts.append(
            f"**{where}**, {facts['cores']} cores, torch {facts['torch']}, Python {facts['python']} "
            f"(`benchmarks/results/{folder.name}/`)"
        )
        if "train" in files:
            parts.append(_train_table(files.pop("train")))
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
        f"| {row['contestant']} | {row['ms']:.0f} | {row['tokens_per_second']:,.0f} | {row['ratio_to_plain_fp32']:.2f} "
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
            ours = next(row for row in rows if row["contestant"] == "megakern")
            peer = min((row for row in rows if row is not ours), key=lambda row: row["us"])
            lines.append(
                f"| {op} | {shape} | {dtype} | {'backward' if backward else 'forward'} | {ours['us']:.0f} "
                f"| {quantity(ours['rate'], ours['unit'])} | {ours['share_of_limit']:.0%} "
                f"| {peer['us'] / ours['us']:.2f} ({peer['contestant']}) |"
            )
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    if not parser.parse_args().write:
        print(tables())
        return
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
