"""The tables of a report: differences, values by text or task beside the paper's, and results.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext.evaluation import published
from polycom_ext.report.results import Family, Result, common_steps, last
from polycom_ext.runs.record import Series, mean

DIFFERENCE_STEPS = 8
"""Columns of the table of differences, at most."""

EVALUATED = {"accuracy": "lm-eval, by polycom eval", "loss": "token files, by polycom eval"}
"""Metric -> what is said of its numbers that no trainer has measured."""

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
    groups: list[tuple[str, list[Result]]]
    """How the numbers were measured, and the runs of which: the columns, one group after the other."""
    names: list[str]
    """Activations of the paper's table that are also here."""
    rows: list[tuple[str, Values, Values]]
    means: tuple[Values, Values]
    """Of the measured rows, where a run has them all, and of the paper's: the same rows if it has any."""
    mean_note: str
    """Which rows the means are of, where that is not plain."""


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
    """Last values of `loss` by text or `accuracy` by task; None where a table would say nothing more.

    What was measured while training and what `polycom eval` measured stand in columns of their own.
    """
    trained = [
        {label: last(series) for label, series in _measured(one, metric).items()} for one in family.results
    ]
    evaluated: list[dict[str, float | None]] = [{**one.evaluated[metric]} for one in family.results]
    ways = [("measured while training", trained), (EVALUATED[metric], evaluated)]
    ways = [(title, ends) for title, ends in ways if any(ends)]
    if len(ways) == 1 and any(trained):
        ways = [("measured here", trained)]
    ends = [end for _, one in ways for end in one]
    labels = sorted({label for end in ends for label in end})
    table = family.published.table(metric)
    columns = table.columns if table else {}
    titles = published.titles()
    alone = metric == "loss" and len(labels) == 1 and labels[0] not in columns
    if not labels or (alone and not any(evaluated)):
        return None
    labels.sort(key=lambda label: list(columns).index(label) if label in columns else len(columns))
    rows = table.rows if table else {}
    names = list(dict.fromkeys(one.in_paper for one in family.results if one.in_paper in rows))
    body = [
        (
            titles.get(label, label),
            [end.get(label) for end in ends],
            [rows[name].get(label) for name in names],
        )
        for label in labels
    ]
    shared = [label for label in labels if label in columns] if names else []
    measured = [_mean([end.get(label) for label in shared or labels]) for end in ends]
    averages: Values = [None for _ in names]
    note = ""
    if table and shared:
        whole = len(shared) == len(columns)
        averages = [
            table.average[name] if whole else _mean([rows[name][one] for one in shared]) for name in names
        ]
        if not whole or len(shared) < len(labels):
            note = f"of the {len(shared)} that both have" + (
                "" if whole else f"; the paper's table has {len(columns)}"
            )
    groups = [(title, family.results) for title, _ in ways]
    return SideBySide(table, groups, names, body, (measured, averages), note)


def conditions(family: Family) -> str:
    """What the numbers of `polycom eval` were measured on, a sentence; nothing where there are none."""
    found = [one.run.evaluation for one in family.results if one.run.evaluation is not None]
    settings = [entry["settings"] for one in found for entry in one["tasks"].values()]
    if not settings:
        return ""
    parts = [
        " and ".join(sorted({f"lm-eval {one['lm_eval']}" for one in settings})),
        " and ".join(sorted({f"data: {one['data']}" for one in settings})),
    ]
    if limits := sorted({one["limit"] for one in settings if one["limit"] is not None}):
        parts.append(f"the first {' or '.join(map(str, limits))} documents of a task only")
    if shots := sorted({one["num_fewshot"] for one in settings if one["num_fewshot"] is not None}):
        parts.append(f"{' or '.join(map(str, shots))} examples")
    metrics = [f"{task.title} {task.metric}" for task in published.tasks().values() if task.metric != "acc"]
    return f"{'; '.join(parts)}. Metric: acc, but {', '.join(metrics)}: the paper does not name its metrics."


def write_csv(families: Sequence[Family], path: Path) -> None:
    """One row a run, measured numbers first, the paper's last; empty where there is none."""
    rows = [_row(family, result) for family in families for result in family.results]
    names = list(dict.fromkeys(name for row in rows for name in row if not name.startswith("paper")))
    names += list(dict.fromkeys(name for row in rows for name in row if name.startswith("paper")))
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
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
        "tokens_per_second": result.tokens_per_second,
        "mfu": result.mfu,
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    row |= {f"valid/{label}/loss": last(series) for label, series in result.losses.items()}
    row |= {f"eval/{task}/accuracy_percent": last(series) for task, series in result.accuracies.items()}
    row |= {f"lm-eval/{task}/percent": value for task, value in result.evaluated["accuracy"].items()}
    row |= {f"tokens/{label}/loss": value for label, value in result.evaluated["loss"].items()}
    for column in family.published.headline:
        row[f"paper table {column.table}: {column.title}"] = column.values.get(result.in_paper or "")
    return row


def _measured(result: Result, metric: str) -> dict[str, Series]:
    return result.losses if metric == "loss" else result.accuracies


def _mean(values: Values) -> float | None:
    present = [value for value in values if value is not None]
    return mean(present) if present and len(present) == len(values) else None
