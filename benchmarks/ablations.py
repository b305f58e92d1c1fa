"""What `make ablations` has found, in Markdown beside the report's CSV files.

    python benchmarks/ablations.py RUNS REPORT --output FOLDER [--note TEXT]

RUNS is the folder of the runs, REPORT that of their report; FOLDER gets README.md, results.csv, groups.csv.
TEXT is what to know of the machine, as that other work shared it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from polycom_ext.machine.processor import processor

HEAD = ("activation", "seeds", "validation loss", "minus the first row's", "speedup in tokens")
CSV_FILES = ("groups.csv", "results.csv")

Row = dict[str, str]


def table(rows: list[Row], runs: list[Row]) -> list[str]:
    """The activations of a family: mean ± standard deviation over their seeds."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in rows:
        cells = [
            row["group"],
            row["seeds"],
            spread(row, "validation_loss", 3),
            "" if row is rows[0] else spread(row, "validation_loss_minus_baseline", 3),
            "" if row is rows[0] else spread(row, "speedup_in_tokens", 2) or reached(row, runs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(row: Row, name: str, digits: int) -> str:
    """Nothing where a seed has no number; a single seed has no deviation."""
    middle, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    if not middle:
        return ""
    return f"{float(middle):.{digits}f}" + (f" ± {float(deviation):.{digits}f}" if deviation else "")


def reached(row: Row, runs: list[Row]) -> str:
    """Of a loss to which not every seed came."""
    same = [one for one in runs if (one["family"], one["group"]) == (row["family"], row["group"])]
    values = [float(one["speedup_in_tokens"]) for one in same if one["speedup_in_tokens"]]
    return f"{mean(values):.2f}, {len(values)} of {len(same)} seeds" if values else "not reached"


def conditions(runs: Path) -> Iterator[str]:
    """Date, machine and versions, from the records of the runs."""
    told: list[dict[str, Any]] = [json.loads(path.read_text()) for path in runs.glob("*/versions.json")]
    times = [
        [datetime.fromisoformat(attempt[what]) for what in ("started", "ended")]
        for one in told
        for attempt in one["attempts"]
        if "ended" in attempt
    ]
    first, last = min(start for start, _ in times), max(end for _, end in times)
    minutes = sum((end - start).total_seconds() for start, end in times) / 60
    upstreams = {f"{name} {tree['version']}" for one in told for name, tree in one["upstreams"].items()}
    versions = sorted({f"torch {one['torch']}" for one in told} | upstreams)
    commits = sorted({one["commit"][:12] for one in told})
    when = f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"
    yield f"{len(told)} runs, of {minutes:.0f} minutes in all, {when};"
    yield f"{processor()}, one thread each; {', '.join(versions)}, commit {', '.join(commits)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    rows, runs = (list(csv.DictReader((arguments.report / name).open(newline=""))) for name in CSV_FILES)
    lines = ["# Figure 5, Table 1 and the mixture of experts, rehearsed", "", *conditions(arguments.runs)]
    lines += [arguments.note] if arguments.note else []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += ["", f"## {family}", "", *table([row for row in rows if row["family"] == family], runs)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "README.md").write_text("\n".join(lines) + "\n")
    for name in CSV_FILES:
        shutil.copy(arguments.report / name, arguments.output / name)


if __name__ == "__main__":
    main()
