"""One run directory, read: the resolved spec, what was logged, the learned coefficients, the versions."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.runs import secrets
from polycom_ext.runs.record import Record, Series, read_metrics

DAMAGE = (
    OSError,
    PolycomError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What is raised where a record holds something else than it should."""


@dataclass(frozen=True)
class Run:
    """What one run directory holds."""

    path: Path
    name: str
    spec: dict[str, Any]
    metrics: dict[str, Series]
    coefficients: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    """What `polycom eval` measured of the last checkpoint that it was given."""
    analysis: dict[str, Any] | None
    versions: dict[str, Any]
    attempts: list[dict[str, Any]]
    """When the trainer was started and ended, and with what exit status."""
    command: str
    last_logged: datetime
    problems: list[str]
    """What of it is damaged, and left out: sentences."""

    @property
    def step(self) -> int:
        """The last step of which anything was logged."""
        return max(max(series) for series in self.metrics.values())


def read(path: Path) -> Run:
    """Read a run directory; what is damaged of what a report can do without is left out, and said.

    Raises PolycomError where it is none, or where nothing was logged.
    """
    record = Record(path)
    spec = record.read_spec()
    logged = read_metrics(record.metrics)
    if not logged.series:
        raise PolycomError(
            f"run {path} never logged a metric, so there is nothing to report: see its {record.log.name}"
        )
    problems: list[str] = []

    def whole(part: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return part()
        except DAMAGE as error:
            problems.append(str(error))
            return otherwise

    script = record.command
    command = whole(lambda: script.read_text("utf-8", "replace").strip() if script.exists() else "", "")
    spec, command = _without_secrets(spec, command)
    versions = whole(record.read_versions, {})
    if logged.unreadable_lines:
        lines = "1 line" if logged.unreadable_lines == 1 else f"{logged.unreadable_lines} lines"
        problems.append(f"{record.metrics}: {lines} that cannot be read left out")
    return Run(
        path=path,
        name=str(spec.get("name") or path.name),
        spec=spec,
        metrics=logged.series,
        coefficients=whole(record.read_coefficients, None),
        evaluation=whole(record.read_evaluation, None),
        analysis=whole(record.read_analysis, None),
        versions={key: value for key, value in versions.items() if key != "attempts"},
        attempts=whole(record.attempts, []) if "attempts" in versions else [],
        command=command,
        last_logged=datetime.fromtimestamp(record.metrics.stat().st_mtime),
        problems=problems,
    )


def _without_secrets(spec: dict[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """The spec and the command with a reference in place of each value that looks like a secret."""
    environment = spec.get("environment")
    if not isinstance(environment, dict):
        return spec, command
    texts = {str(name): str(value) for name, value in environment.items()}
    for name, value in secrets.values(texts).items():
        for written in (shlex.quote(value), value) if value else ():
            command = command.replace(f"{name}={written}", f"{name}={secrets.reference(name)}")
    return {**spec, "environment": secrets.masked(texts)}, command
