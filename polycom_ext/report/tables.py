"""The tables of a report: differences, values by text or task beside the paper's, and results.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from polycom_ext.report import published
from polycom_ext.report.results import Family, Result, common_steps, last
from polycom_ext.report.rundir import Series

DIFFERENCE_STEPS = 8
"""Columns of the table of differences, at most."""

Values = list[float | None]


@dataclass(frozen=True)
class Differences:
    """Validation loss minus the baseline's, at steps at which both were evaluated."""

    steps: list[int]
    rows: list[tuple[Result, Values]]


@dataclass(frozen=True)
class SideBySide:
    """Texts or tasks down; the measured runs, then the paper's activations, across."""

    table: published.Table | None
    names: list[str]
    """Activations of the paper's table that are also here."""
    rows: list[tuple[str, Values, Values]]
    means: tuple[Values, Values]
    """Of the measured rows, where a run has them all; of all rows of the paper's table, as published."""


def differences(family: Family) -> Differences | None:
    """None where no run shares a validation step with the baseline."""
    others = family.results[1:]
    steps = sorted({step for result in others for step in common_steps(result, family.baseline)})
    if not steps:
        return None
    count = min(DIFFERENCE_STEPS, len(steps))
    chosen = [steps[math.ceil((index + 1) * len(steps) / count) - 1] for index in range(count)]
    return Differences(
        chosen, [(one, [difference(one, family.baseline, step) for step in chosen]) for one in others]
    )


def difference(result: Result, baseline: Result, step: int) -> float | None:
    """Validation loss minus the baseline's at one step; None where one of them was not evaluated."""
    if step not in result.validation or step not in baseline.validation:
        return None
    return result.validation[step] - baseline.validation[step]


def side_by_side(family: Family, metric: str) -> SideBySide | None:
    """Last values of `loss` by text or `accuracy` by task; None where a table would say nothing more."""
    ends = [
        {label: last(series) for label, series in _measured(one, metric).items()} for one in family.results
    ]
    labels = sorted({label for end in ends for label in end})
    table = family.published.table(metric)
    columns = table.columns if table else {}
    if not labels or (metric == "loss" and len(labels) == 1 and labels[0] not in columns):
        return None
    labels.sort(key=lambda label: list(columns).index(label) if label in columns else len(columns))
    rows = table.rows if table else {}
    names = list(dict.fromkeys(one.in_paper for one in family.results if one.in_paper in rows))
    body = [
        (
            columns.get(label, label),
            [end.get(label) for end in ends],
            [rows[name].get(label) for name in names],
        )
        for label in labels
    ]
    measured = [_mean([values[index] for _, values, _ in body]) for index in range(len(ends))]
    averages = [table.average.get(name) for name in names] if table else []
    return SideBySide(table, names, body, (measured, averages))


def write_csv(families: Sequence[Family], path: Path) -> None:
    """One row a run, measured numbers first, the paper's last; empty where there is none."""
    rows = [_row(family, result) for family in families for result in family.results]
    names = list(dict.fromkeys(name for row in rows for name in row if not name.startswith("paper")))
    names += list(dict.fromkeys(name for row in rows for name in row if name.startswith("paper")))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _row(family: Family, result: Result) -> dict[str, Any]:
    common = common_steps(result, family.baseline)
    row = {
        "family": family.title,
        "run": result.run.name,
        "activation": result.spec.entry.name,
        "order": result.order,
        "ffn_width": result.spec.matched_ffn_width,
        "ffn_parameters": result.ffn_parameters,
        "step": result.run.step,
        "target_step": result.target,
        "tokens": result.tokens,
        "train_loss": result.train_loss,
        "validation_loss": result.validation_loss,
        "validation_perplexity": result.perplexity,
        "validation_loss_minus_baseline": difference(result, family.baseline, common[-1]) if common else None,
        "step_seconds": result.step_seconds,
    }
    row |= {f"valid/{label}/loss": last(series) for label, series in result.losses.items()}
    row |= {f"eval/{task}/accuracy_percent": last(series) for task, series in result.accuracies.items()}
    for column in family.published.headline:
        row[f"paper table {column.table}: {column.title}"] = column.values.get(result.in_paper or "")
    return row


def _measured(result: Result, metric: str) -> dict[str, Series]:
    return result.losses if metric == "loss" else result.accuracies


def _mean(values: Values) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None
