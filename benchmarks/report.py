"""Every table of figures, as Markdown that a terminal shows well too: for each kind of results one function.

A table is made from results as they lie in benchmarks/results/<machine>/*.json, and from nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from megakern.train.metrics import quantity

Row = dict[str, Any]
UNKNOWN = "-"  # a figure that results from before it was measured do not have


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of equal width; columns of figures stand to the right."""
    right = [all(_is_figure(row[i]) for row in rows) for i in range(len(head))]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        each = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(each)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)])


def _is_figure(cell: str) -> bool:
    return cell == UNKNOWN or cell[:1].isdigit() or cell[:1] in "+-("


def spread(middle: float, low: float, high: float, form: str = ".0f") -> str:
    """ "73 (71 to 80)": the median, the fastest and the slowest."""
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def figure(row: Row, name: str, form: str) -> str:
    return UNKNOWN if row.get(name) is None else f"{row[name]:{form}}"


def size(count: float | None) -> str:
    """Bytes in words: 1.5e6 -> "1.5 MB"."""
    return UNKNOWN if count is None else quantity(count, "B")


def failures(rows: list[Row]) -> list[Row]:
    """Those of ours that raised or gave a wrong result. A peer that cannot do a shape is none."""
    return [row for row in rows if "error" in row and row["contestant"].startswith("megakern")]


# --- ops ---


def op_table(rows: list[Row]) -> str:
    """A line for each figure of ours, with the ratio to each peer; then what was not timed, and who is not here."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["dtype"], row["backward"])
        groups.setdefault(key, {})[row["contestant"]] = row
    lines, wrong, missing = [], [], {}
    here = {row["contestant"] for row in rows if "us" in row}
    for (op, shape, dtype, backward), found in groups.items():
        label = [op, shape, dtype, "backward" if backward else "forward"]
        for name, row in found.items():
            if "missing" in row:
                missing.setdefault((name, row["missing"]), []).append(shape)
            elif "error" in row:
                wrong.append(f"not timed: {', '.join(label)}, {name}: {row['error'][:160]}")
            elif name.startswith("megakern"):
                lines.append([*label, *_figures(name, row, found)])
    head = ["op", "shape", "dtype", "pass", "who", "us (fastest to slowest)", "rate", "of limit", "peak memory"]
    if any("launch_us" in row for row in rows):
        head.append("launch us")
    lines = [line[: len(head)] + line[-1:] for line in lines]
    parts = [grid([*head, "times as fast as"], lines)] if lines else []
    parts += ["\n".join(wrong)] if wrong else []
    for (name, reason), where in missing.items():
        of = f" for {', '.join(dict.fromkeys(where))}" if name in here else ""
        parts.append(f"not here{of}: {name} ({reason})")
    return "\n\n".join(parts)


def _figures(name: str, row: Row, found: dict[str, Row]) -> list[str]:
    peers = {peer: each["us"] / row["us"] for peer, each in found.items() if _is_timed_peer(peer, each)}
    form = ".0f" if row["us"] >= 10 else ".1f"
    return [
        row.get("backend") or name.removeprefix("megakern").strip() or "auto",
        spread(row["us"], row["fastest_us"], row["slowest_us"], form),
        quantity(row["rate"], row["unit"]),
        f"{row['share_of_limit']:.0%}",
        size(row.get("peak_bytes")),
        f"{row['launch_us']:.0f}" if "launch_us" in row else UNKNOWN,
        ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in peers.items()) or "no peer",
    ]


def _is_timed_peer(name: str, row: Row) -> bool:
    return not name.startswith("megakern") and "us" in row


def op_summary(files: dict[str, Row]) -> str:
    """A line for each op of a machine: the lowest, median and highest ratio to the fastest peer over its shapes."""
    groups: dict[tuple, dict[tuple, dict[str, Row]]] = {}
    for results in files.values():
        for row in results["rows"]:
            key = (row["op"], row["dtype"], row["backward"])
            groups.setdefault(key, {}).setdefault(row["shape"], {})[row["contestant"]] = row
    lines = []
    for (op, dtype, backward), shapes in groups.items():
        ratios, shares, rivals = [], [], []
        for found in shapes.values():
            ours = [row for name, row in found.items() if name.startswith("megakern") and "us" in row]
            peers = {name: row["us"] for name, row in found.items() if _is_timed_peer(name, row)}
            if ours and peers:
                best, rival = min(ours, key=lambda row: row["us"]), min(peers, key=peers.get)
                ratios.append(peers[rival] / best["us"])
                shares.append(best["share_of_limit"])
                rivals.append(rival)
        if ratios:
            lines.append([
                op, dtype, "backward" if backward else "forward", str(len(ratios)),
                spread(statistics.median(ratios), min(ratios), max(ratios), ".2f"), ", ".join(dict.fromkeys(rivals)),
                f"{min(shares):.0%} to {max(shares):.0%}",
            ])  # fmt: skip
    return grid(["op", "dtype", "pass", "shapes", "times as fast (from to)", "as the fastest of", "of limit"], lines)


# --- whole steps, generation, start-up ---


def workloads_table(results: Row, *, profile: bool = True) -> str:
    return "\n\n".join(train_table(workload, profile=profile) for workload in results["workloads"])


def train_table(workload: Row, *, profile: bool = True, goals: bool = True) -> str:
    """One workload of a training step: each contestant beside the first; with `profile` where their time goes."""
    model = ", ".join(f"{name} {value}" for name, value in workload["model"].items())
    rows = [row for row in workload["rows"] if "ms" in row]
    lines = [
        [
            row["contestant"], spread(row["ms"], row["fastest_ms"], row["slowest_ms"]),
            f"{row['tokens_per_second']:,.0f}", figure(row, "ratio_to_first", ".2f"), figure(row, "mfu_causal", ".1%"),
            figure(row, "mfu_full", ".1%"), f"{row['matmul_floor_ms']:.0f}", size(row.get("peak_bytes")),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["contestant", "ms a step (from to)", "tokens/s", f"x {workload['rows'][0]['contestant']}", "MFU causal",
            "MFU full", "floor, ms", "peak memory"]  # fmt: skip
    parts = [f"A training step of {workload.get('name', 'a GPT')} ({model}, batch {workload['batch']}):"]
    parts += [grid(head, lines)] if lines else []
    parts += not_timed(workload["rows"], rows)
    parts += [goals_table(workload["goals"])] if goals and workload.get("goals") else []
    parts += [breakdown_table(rows)] if profile and any("breakdown" in row for row in rows) else []
    return "\n\n".join(parts)


def not_timed(rows: list[Row], timed: list[Row]) -> list[str]:
    """One paragraph about those of `rows` that are not among `timed`, or none."""
    left = [f"not timed: {r['contestant']}: {r.get('missing') or r.get('error')}" for r in rows if r not in timed]
    return ["\n".join(left)] if left else []


def breakdown_table(rows: list[Row]) -> str:
    """Where the time of a step goes, in milliseconds a step under the profiler."""
    shown = [row for row in rows if "breakdown" in row]
    kinds = list(dict.fromkeys(kind for row in shown for kind in row["breakdown"]["ms"]))
    lines = []
    for row in shown:
        ms = row["breakdown"]["ms"]
        longest = ", ".join(f"{name} {value:.1f}" for name, value in row["breakdown"]["longest"][:3])
        lines.append([row["contestant"], *(f"{ms.get(kind, 0.0):.1f}" for kind in kinds), longest])
    return grid(["profile, ms a step", *kinds, "longest"], lines)


def goals_table(goals: list[Row]) -> str:
    lines = [
        [goal["what"], f"{goal['wanted']:.2f}", f"{goal['reached']:.2f}", goal["against"],
         "yes" if goal["reached"] >= goal["wanted"] else f"no; {goal['limit']}" if "limit" in goal else "no"]
        for goal in goals
    ]  # fmt: skip
    return grid(["goal: times as fast", "wanted", "reached", "beside", "holds"], lines)


def generate_table(results: Row) -> str:
    rows = [row for row in results["rows"] if "tokens_per_second" in row]
    lines = [
        [row["contestant"], spread(row["tokens_per_second"], row["slowest"], row["fastest"], ".1f"),
         f"{row['ms_to_first']:.0f}", f"{row['ratio_to_first']:.2f}", f"{row['same_tokens']} of {row['tokens']}",
         size(row.get("bytes_a_token")), figure(row, "of_read_rate", ".0%"), size(row["peak_bytes"])]
        for row in rows
    ]  # fmt: skip
    head = ["contestant", "tokens/s (from to)", "ms to first token", f"x {rows[0]['contestant'] if rows else 'first'}",
            "same tokens", "weights a token", "of read rate", "peak memory"]  # fmt: skip
    parts = [f"Generation, {results['model']}, batch 1, {results['prompt']} tokens of prompt, greedy:"]
    parts += [grid(head, lines)] if lines else []
    parts += not_timed(results["rows"], rows)
    parts += [goals_table(results["goals"])] if results.get("goals") else []
    return "\n\n".join(parts)


def startup_table(results: Row, *, imports: bool = True) -> str:
    lines = [
        [row["what"], spread(row["seconds"], row["fastest"], row["slowest"], ".2f"),
         UNKNOWN if row["goal"] is None else f"{row['goal']:.1f}",
         UNKNOWN if row["goal"] is None else ("yes" if row["seconds"] <= row["goal"] else "no")]
        for row in results["rows"]
    ]  # fmt: skip
    table = grid(["start-up", "seconds (from to)", "goal", "holds"], lines)
    if not imports:
        return table
    slow = grid(["import", "own ms"], [[row["module"], f"{row['ms']:.0f}"] for row in results["imports"]])
    return f"{table}\n\n{slow}"


# --- curves, scaling, growth ---


def curves_table(results: Row) -> str:
    lines = [
        [row["contestant"], f"{row['mean']:.4f}", f"{row['lowest']:.4f} to {row['highest']:.4f}", row["verdict"]]
        for row in results["rows"]
    ]
    head = [f"loss after {results['steps']} steps", "mean", f"of {results['seeds']} seeds", "within the spread of fp32"]
    return grid(head, lines)


def scaling_table(results: Row) -> str:
    alone = any(row.get("all_reduce_ms") for row in results["rows"])  # not in results of before it was measured
    lines = [
        [row["layout"], str(row["processes"]), str(row["threads"]),
         spread(row["ms"], row["fastest_ms"], row["slowest_ms"]), f"{row['tokens_per_second']:,.0f}",
         f"{row['speedup']:.2f}", f"{row['efficiency']:.0%}", f"{row['communication_ms']:.1f}",
         *([_all_reduce(row)] if alone else []), size(row["peak_bytes"])]
        for row in results["rows"]
    ]  # fmt: skip
    head = ["layout", "processes", "threads each", "ms a step (from to)", "tokens/s", "x one core", "efficiency",
            "communication, ms", *(["an all-reduce of 3072 x 384 in fp32, bf16, ms"] if alone else []),
            "peak memory of a process"]  # fmt: skip
    return grid(head, lines)


def _all_reduce(row: Row) -> str:
    """Of layouts with tensor parallelism."""
    found = row["all_reduce_ms"]
    return "" if found is None else f"{found['float32']:.2f}, {found['bfloat16']:.2f}"


def growth_table(results: Row) -> str:
    lines = [
        [row["op"], row["by"], f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
         ", ".join(f"{ms:.2f}" for ms in row["ms"]), f"{row['exponent']:.2f}", f"{row['last_exponent']:.2f}",
         f"{row['expected']:g}", f"{row['memory_exponent']:.2f}", row["verdict"]]
        for row in results["rows"]
    ]  # fmt: skip
    head = [
        "cost of",
        "grows with",
        "from to",
        "ms",
        "exponent",
        "of the last step",
        "expected",
        "of memory",
        "verdict",
    ]
    return grid(head, lines)


TABLES: dict[str, Callable[[Row], str]] = {
    "train": workloads_table,
    "patch": workloads_table,
    "generate": generate_table,
    "startup": startup_table,
    "curves": curves_table,
    "scaling": scaling_table,
    "growth": growth_table,
}
