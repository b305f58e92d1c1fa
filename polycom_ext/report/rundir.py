"""One run directory, read: the resolved spec, what was logged, the learned coefficients, the versions."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from polycom_ext.errors import PolycomError
from polycom_ext.runs import document
from polycom_ext.runs.secrets import is_secret, reference

Series = dict[int, float]
"""step -> value, ascending"""

TRAIN_LOSS = "train/loss"
STEP_SECONDS = "train/step_seconds"
EVALUATIONS = ("valid/", "test/", "eval/")
"""Beginnings of the names of what is evaluated, not trained."""
LARGEST = 1e100
"""Sums and differences of values up to this are finite; no loss and no time is larger."""


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
    script = path / "command.sh"
    command = script.read_text(encoding="utf-8", errors="replace").strip() if script.is_file() else ""
    spec, command = _without_secrets(spec, command)
    versions = _optional_json(path / "versions.json") or {}
    return Run(
        path=path,
        name=str(spec.get("name") or path.name),
        spec=spec,
        metrics=metrics,
        coefficients=_optional_json(path / "coefficients.json"),
        versions={key: value for key, value in versions.items() if key != "attempts"},
        attempts=versions.get("attempts", []),
        command=command,
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
    """Merge the lines of all attempts.

    Of several values of one name at one step, the last counts; but of evaluations the first, because a
    trainer evaluates once more after its last step, on other batches. Where steps go back, or a step is
    trained again, a run was resumed from before it: evaluations from there on count anew.
    """
    series: dict[str, Series] = {}
    unreadable, at = 0, -1
    settled: set[tuple[str, int]] = set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
            step = int(record["step"])
            values = {str(name): _number(value) for name, value in record["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            unreadable += 1
            continue
        if step < at or (TRAIN_LOSS in values and step in series.get(TRAIN_LOSS, {})):
            settled = {(name, evaluated) for name, evaluated in settled if evaluated < step}
        at = step
        for name, value in values.items():
            if (name, step) not in settled:
                series.setdefault(name, {})[step] = value
            if name.startswith(EVALUATIONS):
                settled.add((name, step))
    return {name: dict(sorted(values.items())) for name, values in series.items()}, unreadable


def _number(value: Any) -> float:
    """A logged value; what is too large to reckon with is infinite."""
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def _without_secrets(spec: dict[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """The spec and the command with a reference in place of each value that looks like a secret."""
    environment = spec.get("environment")
    if not isinstance(environment, dict):
        return spec, command
    texts = {str(name): str(value) for name, value in environment.items()}
    for name, value in texts.items():
        if is_secret(name, value) and value:
            for written in dict.fromkeys((shlex.quote(value), value)):
                command = command.replace(f"{name}={written}", f"{name}={reference(name)}")
    shown = {
        name: reference(str(name)) if is_secret(str(name), str(value)) else value
        for name, value in environment.items()
    }
    return {**spec, "environment": shown}, command
