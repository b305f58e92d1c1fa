"""One run directory, read: the resolved spec, what was logged, the learned coefficients, the versions."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import results
from polycom_ext.report.results import SETTINGS, Result
from polycom_ext.runs import secrets
from polycom_ext.runs import spec as run_spec
from polycom_ext.runs.record import Record, read_metrics

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


def read(path: Path) -> Result:
    """Read a run directory; what is damaged of what a report can do without is left out, and said.

    Raises PolycomError where it is none, where its run.yaml is no spec, or where nothing was logged.
    """
    record = Record(path)
    resolved = record.read_spec()
    logged = read_metrics(record.metrics)
    if not logged.series:
        raise PolycomError(
            f"run {path} never logged a metric, so there is nothing to report: see its {record.log.name}"
        )
    problems: list[str] = []

    def whole(what: str, part: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return part()
        except DAMAGE as error:
            unclear = f"{path}: its {what} is left out, as it cannot be understood: {error!r}"
            problems.append(str(error) if isinstance(error, PolycomError) else unclear)
            return otherwise

    resolved, command = _without_secrets(resolved, whole("command", record.read_command, ""))
    versions = whole("list of versions", record.read_versions, {})
    if lines := logged.unreadable_lines:
        problems.append(f"{record.metrics}: {lines} line{'s' * (lines > 1)} that cannot be read left out")
    return Result(
        path=path,
        name=str(resolved.get("name") or path.name),
        spec=run_spec.from_mapping(resolved, str(record.spec)),
        resolved=resolved,
        metrics=logged.series,
        coefficients=whole("file of coefficients", record.read_coefficients),
        analysis=whole("analysis", record.read_analysis),
        **whole("evaluation", lambda: _evaluation(record.read_evaluation() or {}), _evaluation({})),
        versions={key: value for key, value in versions.items() if key != "attempts"},
        attempts=whole("list of attempts", record.attempts, []) if "attempts" in versions else [],
        command=command,
        last_logged=datetime.fromtimestamp(record.metrics.stat().st_mtime),
        problems=problems,
    )


def _evaluation(found: dict[str, Any]) -> dict[str, Any]:
    """`evaluated` and `settings` of a Result."""
    tasks = found.get("tasks", {})
    scores = {name: results.value(name, entry) for name, entry in tasks.items()}
    accuracies = {name: 100 * float(score) for name, score in scores.items() if score is not None}
    losses = {label: float(entry["loss"]) for label, entry in found.get("tokens", {}).items()}
    asked = [{name: entry["settings"][name] for name in SETTINGS} for entry in tasks.values()]
    settings = [{name: str(value) for name, value in one.items() if value is not None} for one in asked]
    return {"evaluated": {"task": accuracies, "text": losses}, "settings": settings}


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
