"""The tables of a report: speedups, differences, values by text or task beside the paper's, CSV files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polycom_ext import activations
from polycom_ext.evaluation import published
from polycom_ext.report.families import Family
from polycom_ext.report.results import SETTINGS

DIFFERENCE_STEPS = 8
"""Columns of the table of differences, at most."""
TRAINED = "measured while training"
EVALUATED = {"task": "lm-eval, by polycom eval", "text": "token files, by polycom eval"}
METRICS = {"task": "accuracy", "text": "loss"}
"""What a curve is of -> the metric of the paper's table."""
MEAN, PAPER = "Mean", "paper"

Rows = dict[str, tuple[pd.DataFrame, pd.DataFrame]]
"""By label the values, a row a seed, and their differences from the first label's: nothing of its own."""


def speedups(family: Family, x: str) -> dict[str, pd.Series]:
    """Where the baseline ended, over where a run first came to its final validation loss.

    The loss is that of the same seed, by which trainers may draw what they evaluate, or the mean of all.

    Args:
        x: what is compared, `tokens` or `hours`; between two evaluations a run's loss is a straight line.

    Returns: by seed for each group, the baseline among them; NaN for what never came there.
    """
    base = family.baseline.frame("validation")
    spent = family.baseline.along(base.index[-1:], x)
    made = {}
    for group in family.groups if len(spent) and math.isfinite(spent[0]) else ():
        frame = group.frame("validation")
        places, goals = group.along(frame.index, x), base.iloc[-1]
        reached = {
            seed: _reached(places, curve, goals.get(seed, goals.mean())) for seed, curve in frame.items()
        }
        made[group.label] = spent[0] / pd.Series(reached, dtype=float)
    return made


def _reached(places: np.ndarray, curve: pd.Series, loss: float) -> float:
    below = np.flatnonzero(curve <= loss)
    if not len(below) or not math.isfinite(loss):
        return math.nan
    around = slice(max(0, below[0] - 1), below[0] + 1)
    if not np.isfinite(curve.iloc[around]).all():
        return float(places[below[0]])
    return float(np.interp(-loss, -curve.iloc[around], places[around]))


def differences(family: Family) -> pd.DataFrame:
    """Validation loss minus the baseline's of the same seed: a row a step, a column a group and seed."""
    base = family.baseline.frame("validation")
    curves = {
        (group.label, seed): curve
        for group in family.groups[1:]
        for seed, curve in group.frame("validation").sub(base).dropna(axis=1, how="all").items()
    }
    frame = pd.DataFrame(curves).dropna(how="all")
    count = min(DIFFERENCE_STEPS, len(frame))
    return frame.iloc[[math.ceil((one + 1) * len(frame) / count) - 1 for one in range(count)]]


@dataclass(frozen=True)
class Scores:
    """Texts or tasks, and their mean, measured here and in the paper."""

    table: published.Table | None
    columns: list[str]
    blocks: dict[str, Rows]
    """How the numbers came about -> those of each group; last the PAPER's, of each activation."""
    note: str
    """Which columns the means are of, where that is not plain."""


def scores(family: Family, kind: str) -> Scores | None:
    """Last values by `text` or `task`; None where a table would say nothing more.

    What was measured while training and what `polycom eval` measured stand in blocks of their own.
    """
    table = family.published.table(METRICS[kind])
    columns = list(table.columns) if table else []
    ways: dict[str, dict[str, pd.DataFrame]] = {TRAINED: {}, EVALUATED[kind]: {}}
    for group in family.groups:
        names = [name for name in group.names if name.startswith(f"{kind}/")]
        ways[TRAINED][group.label] = pd.DataFrame({name[5:]: group.final(name) for name in names})
        evaluated = {seed: one.evaluated[kind] for seed, one in group.counted.items()}
        ways[EVALUATED[kind]][group.label] = pd.DataFrame(evaluated).T
    ways = {way: frames for way, frames in ways.items() if any(frame.size for frame in frames.values())}
    labels = sorted({str(label) for frames in ways.values() for frame in frames.values() for label in frame})
    alone = kind == "text" and len(labels) == 1 and labels[0] not in columns
    if not labels or (alone and EVALUATED[kind] not in ways):
        return None
    labels.sort(key=lambda label: columns.index(label) if label in columns else len(columns))
    in_paper = dict.fromkeys(group.first.in_paper for group in family.groups)
    titles = {activations.find(name).title: name for name in in_paper if table and name in table.rows}
    shared = [label for label in labels if label in columns] if titles else []
    whole, note, means = len(shared) == len(columns), "", {}
    if table and titles:
        ways[PAPER] = {title: pd.DataFrame([table.rows[name]]) for title, name in titles.items()}
        means = {title: table.average[name] for title, name in titles.items() if whole}
        if shared and (not whole or len(shared) < len(labels)):
            rest = "" if whole else f"; the paper's table has {len(columns)}"
            note = f"of the {len(shared)} that both have{rest}"
    blocks = {
        way: _compared(frames, labels, shared or labels, means if way == PAPER else {})
        for way, frames in ways.items()
    }
    named = published.titles()
    return Scores(table, [*(named.get(one, one) for one in labels), MEAN], blocks, note)


def _compared(
    frames: Mapping[str, pd.DataFrame], labels: list[str], averaged: list[str], means: Mapping[str, float]
) -> Rows:
    """The frames with these columns and the mean of those that are `averaged`, or the one published."""
    whole = {name: frame.reindex(columns=labels).astype(float) for name, frame in frames.items()}
    for name, frame in whole.items():
        frame[MEAN] = means.get(name, frame[averaged].mean(axis=1, skipna=False))
    base = next(iter(whole.values()))
    return {name: (frame, frame[:0] if frame is base else frame - base) for name, frame in whole.items()}


def conditions(family: Family) -> str:
    """What the numbers of `polycom eval` were measured on, a sentence; nothing where there are none."""
    settings = pd.DataFrame([one for result in family.results for one in result.settings])
    if settings.empty:
        return ""
    found = {key: " or ".join(sorted(settings[key].dropna().unique())) for key in settings}
    said = "; ".join(SETTINGS[key].format(values) for key, values in found.items())
    metrics = [f"{task.title} {task.metric}" for task in published.tasks().values() if task.metric != "acc"]
    return f"{said}. Metric: acc, but {', '.join(metrics)}: the paper does not name its metrics."


def write_csv(families: Sequence[Family], folder: Path) -> None:
    """results.csv, a row a run, and groups.csv, a row an activation: mean and deviation over its seeds.

    Measured numbers first, the paper's last; empty where there is none.
    """
    runs = pd.DataFrame([row for family in families for row in _rows(family)], dtype=object)
    described, found = np.split(runs.columns, [runs.columns.get_loc("tokens")])
    paper = [name for name in found if name.startswith("paper")]
    measured = [name for name in found if name not in paper]
    options: Any = {"index": False, "encoding": "utf-8", "errors": "backslashreplace"}
    runs[[*described, *measured, *paper]].to_csv(folder / "results.csv", **options)
    counted = runs[runs["counted"].astype(bool)].astype(dict.fromkeys(measured, float))
    groups = counted.groupby(["family", "group"], sort=False)
    aggregates = [(name, methodcaller(name, skipna=False)) for name in ("mean", "std")]
    with np.errstate(invalid="ignore"):  # of what is infinite there is no deviation
        numbers = groups[measured].agg(aggregates)
    numbers.columns = numbers.columns.map("_".join)
    told = groups[["activation", "order", "ffn_width", "ffn_parameters"]].first()
    told = told.join(groups.size().rename("seeds")).join(numbers).join(groups[paper].first())
    told.reset_index().to_csv(folder / "groups.csv", **options)


def _rows(family: Family) -> Iterator[dict[str, Any]]:
    against, faster = differences(family), {x: speedups(family, x) for x in ("tokens", "hours")}
    last: Any = against.iloc[-1] if len(against) else {}
    units = {"text/": ("valid/", "/loss"), "task/": ("eval/", "/accuracy_percent")}
    for group, one in [(each, one) for each in family.groups for one in each.results]:
        seed = str(one.facts.seed)
        ends = {name: (units[name[:5]], one.final(name)) for name in one.curves if name[:5] in units}
        yield {
            "family": family.title,
            "group": group.label,
            "run": one.name,
            "activation": one.spec.entry.name,
            "order": one.order,
            "seed": one.facts.seed,
            "counted": one in group.counted.values(),
            "ffn_width": one.spec.matched_ffn_width,
            "ffn_parameters": one.ffn_parameters,
            "step": one.step,
            "target_step": one.target,
            **one.numbers,
            "validation_loss_minus_baseline": last.get((group.label, seed)),
            **{f"speedup_in_{x}": found[group.label].get(seed) for x, found in faster.items() if found},
            **{f"{before}{name[5:]}{after}": value for name, ((before, after), value) in ends.items()},
            **{f"lm-eval/{task}/percent": value for task, value in one.evaluated["task"].items()},
            **{f"tokens/{label}/loss": value for label, value in one.evaluated["text"].items()},
            **{
                f"paper table {column.table}: {column.title}": column.values.get(one.in_paper or "")
                for column in family.published.headline
            },
        }
