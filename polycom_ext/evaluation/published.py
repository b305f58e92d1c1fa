"""The paper's tables, as published, and the tasks in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from polycom_ext.runs.adapter import Facts

_FILE = Path(__file__).with_name("published.yaml")
KINDS = ("dense", "moe")


@dataclass(frozen=True)
class Task:
    """A task that the paper evaluates."""

    title: str
    metric: str
    """Of lm-eval's, what is quoted."""
    in_loop: str = ""
    """The label under which a trainer evaluates it while it trains, if that is not lm-eval's name."""


@dataclass(frozen=True)
class Column:
    """One number an activation, shown beside the measured results."""

    title: str
    table: int
    values: dict[str, float]


@dataclass(frozen=True)
class Table:
    """One table of the paper, or the part of it that lists tasks or texts."""

    number: int
    title: str
    metric: str
    """`loss` (validation, by text) or `accuracy` (in percent, by task)."""
    columns: dict[str, str]
    """Label under which a trainer here logs it -> the paper's name for it."""
    average: dict[str, float]
    rows: dict[str, dict[str, float]]
    """Activation -> label -> value."""


@dataclass(frozen=True)
class Published:
    """What the paper says of one kind of model."""

    model: str
    source: str
    order: int
    conditions: dict[str, Any]
    """Named as the fields of Facts, and `tokens`, `data`."""
    headline: list[Column]
    tables: list[Table]
    note: str

    def table(self, metric: str) -> Table | None:
        """The table of that metric, if the paper has one for this kind of model."""
        return next((table for table in self.tables if table.metric == metric), None)

    def same_conditions(self, facts: Facts, steps: int) -> bool:
        """Whether a run has the paper's model and at least its number of tokens."""
        tokens = facts.tokens(steps)
        model = {key: value for key, value in self.conditions.items() if key not in ("tokens", "data")}
        return all(getattr(facts, key) == value for key, value in model.items()) and (
            tokens is not None and tokens >= self.conditions["tokens"]
        )


@cache
def tasks() -> dict[str, Task]:
    """The paper's tasks by lm-eval's names."""
    return {name: Task(**entry) for name, entry in _content()["tasks"].items()}


@cache
def titles() -> dict[str, str]:
    """Label of a task or text, of whatever kind of model -> the paper's name for it."""
    columns = [table.columns for kind in KINDS for table in load(kind).tables]
    return {name: task.title for name, task in tasks().items()} | {
        label: title for one in columns for label, title in one.items()
    }


def in_loop(label: str) -> str:
    """lm-eval's name of what a trainer's evaluation while training calls `label`."""
    return next((name for name, task in tasks().items() if task.in_loop == label), label)


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return content


@cache
def load(kind: str) -> Published:
    """`dense` or `moe`."""
    content = _content()
    entry = content[kind]
    return Published(
        model=entry["model"],
        source=content["source"],
        order=content["order"],
        conditions=entry["conditions"],
        headline=[Column(**column) for column in entry["headline"]],
        tables=[
            Table(
                **{
                    **table,
                    "rows": {
                        activation: dict(zip(table["columns"], values, strict=True))
                        for activation, values in table["rows"].items()
                    },
                }
            )
            for table in entry["tables"]
        ],
        note=entry["note"],
    )
