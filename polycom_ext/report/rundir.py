"""One run directory, read: the resolved spec, what was logged, the learned coefficients, the versions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from polycom_ext.errors import PolycomError
from polycom_ext.runs import document

Series = dict[int, float]
"""step -> value, ascending"""

TRAIN_LOSS = "train/loss"
STEP_SECONDS = "train/step_seconds"


@dataclass(frozen=True)
class Run:
    """What one run directory holds."""

    path: Path
    name: str
    spec: dict[str, Any]
    metrics: dict[str, Series]
    coefficients: dict[str, Any] | None
    versions: dict[str, Any]
    attempts: list[dict[str, Any]]
    """When the trainer was started and ended, and with what exit status."""
    command: str
    last_logged: datetime
    unreadable_lines: int
    """Lines of metrics.jsonl that hold no record: a killed process may leave one half-written."""

    @property
    def step(self) -> int:
        """The last step of which anything was logged."""
        return max(max(series) for series in self.metrics.values())

    def labelled(self, prefix: str, suffix: str) -> dict[str, Series]:
        """`valid/LABEL/loss` -> {LABEL: series} for "valid/" and "/loss"; `valid/loss` has the label ""."""
        return {
            name[len(prefix) : -len(suffix)]: series
            for name, series in self.metrics.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }


def read(path: Path) -> Run:
    """Read a run directory. Raises PolycomError where it is none, or where nothing was logged."""
    if not (path / "run.yaml").is_file():
        raise PolycomError(f"{path} is not a run directory: it has no run.yaml (`polycom run` writes one)")
    spec = _parse(path / "run.yaml", document.load, yaml.YAMLError)
    for key in ("trainer", "activation"):
        if not isinstance(spec.get(key), str):
            raise PolycomError(f"{path / 'run.yaml'} names no {key}")
    metrics, unreadable = _read_metrics(path / "metrics.jsonl")
    if not metrics:
        raise PolycomError(
            f"run {path} never logged a metric, so there is nothing to report: see its log.txt"
        )
    command = path / "command.sh"
    versions = _optional_json(path / "versions.json") or {}
    return Run(
        path=path,
        name=str(spec.get("name") or path.name),
        spec=spec,
        metrics=metrics,
        coefficients=_optional_json(path / "coefficients.json"),
        versions={key: value for key, value in versions.items() if key != "attempts"},
        attempts=versions.get("attempts", []),
        command=command.read_text(encoding="utf-8").strip() if command.is_file() else "",
        last_logged=datetime.fromtimestamp((path / "metrics.jsonl").stat().st_mtime),
        unreadable_lines=unreadable,
    )


def _parse(path: Path, parse: Any, error: type[Exception]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (error, UnicodeDecodeError) as problem:
        raise PolycomError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(content, dict):
        raise PolycomError(f"{path} cannot be read: it holds no mapping")
    return content


def _optional_json(path: Path) -> dict[str, Any] | None:
    return _parse(path, json.loads, json.JSONDecodeError) if path.is_file() else None


def _read_metrics(path: Path) -> tuple[dict[str, Series], int]:
    """Merge the lines of all attempts: a later line for the same step and name wins."""
    series: dict[str, Series] = {}
    unreadable = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
            step = int(record["step"])
            values = {str(name): float(value) for name, value in record["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1
            continue
        for name, value in values.items():
            series.setdefault(name, {})[step] = value
    return {name: dict(sorted(values.items())) for name, values in series.items()}, unreadable
