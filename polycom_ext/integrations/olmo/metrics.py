"""What OLMo's trainer measures, kept in a run's metrics.jsonl as well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

NAMES = {
    "train/CrossEntropyLoss": "train/loss",
    "train/LoadBalancingLoss": "train/load_balancing_loss",
    "train/MoEZLoss": "train/z_loss",
    "optim/total_grad_norm": "train/grad_norm",
}
PATTERNS = (
    (re.compile(r"eval/(?P<label>[^/]+)/CrossEntropyLoss"), r"valid/\g<label>/loss"),
    (re.compile(r"eval/downstream/(?P<task>.+?)_(len_norm|pmi_dc|acc)"), r"eval/\g<task>/acc"),
)
"""OLMo's name -> the name in metrics.jsonl. A task's accuracy is called after how its answers were ranked."""


def rename(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a run keeps, under the names that it keeps them by."""
    kept = {}
    for name, value in metrics.items():
        if name in NAMES:
            kept[NAMES[name]] = float(value)
            continue
        for pattern, replacement in PATTERNS:
            match = pattern.fullmatch(name)
            if match:
                kept[match.expand(replacement)] = float(value)
    return kept


class MetricsWriter:
    """Appends `{"step": …, "metrics": {…}}` lines to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, unless there is nothing to say."""
        if metrics:
            self._file.write(json.dumps({"step": step, "metrics": dict(metrics)}) + "\n")
