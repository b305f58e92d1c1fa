"""An evaluation beside the paper's tables, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polycom_ext import activations
from polycom_ext.evaluation import published, results


def text(name: str, found: Mapping[str, Any]) -> str:
    """Percent by task, and nats a token by token file; the paper's where its model has that activation."""
    paper = published.load(found["kind"]) if found.get("kind") in published.KINDS else None
    order = {label: place for place, label in enumerate(published.titles())}
    lines = [f"{name}: {found['checkpoint']}"]
    for section, metric in (("tasks", "accuracy"), ("tokens", "loss")):
        entries = found[section]
        if not entries:
            continue
        table = paper.table(metric) if paper else None
        beside = table.rows.get(str(found["activation"]), {}) if table else {}
        title = ""
        if paper and table and beside:
            title = (
                f"paper, Table {table.number}: {activations.find(found['activation']).title}, {paper.model}"
            )
        lines.append(f"  {'':<28}{'here':>10}{'':>14}  {title}".rstrip())
        for label in sorted(entries, key=lambda label: (order.get(label, len(order)), label)):
            lines.append(_line(label, entries[label], metric, beside))
    return "\n".join(lines)


def _line(label: str, entry: Mapping[str, Any], metric: str, beside: Mapping[str, float]) -> str:
    if metric == "accuracy":
        value = results.value(label, entry)
        here = "–" if value is None else f"{100 * value:.2f}"
        of = f"{documents(entry)} documents"
    else:
        here, of = f"{entry['loss']:.4f}", f"PPL {entry['perplexity']:.2f}"
    theirs = f"{beside[label]:.2f}" if label in beside else ""
    return f"  {label:<28}{here:>10}{of:>16}  {theirs:>10}".rstrip()


def documents(entry: Mapping[str, Any]) -> int:
    """How many documents a task's number is the mean of."""
    return sum(int(one["effective"]) for one in entry["results"].get("n-samples", {}).values())
