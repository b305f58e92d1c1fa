"""What was measured of one checkpoint: a file that grows task by task, so that a killed evaluation goes on.

{"checkpoint": …, "step": …, "activation": …, "kind": …, "fingerprint": …,
 "tasks": {lm-eval's name: {"settings": …, "results": …, "versions": …, "command": …, "ended": …, …}},
 "tokens": {label: {"settings": …, "loss": …, "perplexity": …, …}}}

`settings` are what a number depends on; a number is measured anew where they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from polycom_ext import trainers
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.evaluation import published
from polycom_ext.evaluation.data import HUB
from polycom_ext.files import write_text
from polycom_ext.runs.record import EVALUATION

LIBRARIES = ("lm_eval", "torch", "transformers", "datasets")
SECTIONS = ("tasks", "tokens")


def read(folder: Path) -> dict[str, Any] | None:
    """What is there; None if nothing is. Raises PolycomError for a file that cannot be read."""
    path = folder / EVALUATION
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(found[section], dict) for section in SECTIONS):
            return found
        problem = "it is no evaluation's"
    except (ValueError, KeyError) as error:
        problem = str(error)
    raise PolycomError(f"{path} cannot be read ({problem}); move it away to evaluate anew")


def task_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's number depends on besides the checkpoint, of what `worker.Plan` says."""
    data = plan["data"]
    if data != HUB:
        data = f"{data} {trainers.task_data(data).version()}"
    kept = {name: plan[name] for name in ("limit", "num_fewshot", "max_length", "include")}
    return {"data": data, **kept, "lm_eval": version("lm_eval")}


def token_settings(plan: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a loss on a token file depends on besides the checkpoint."""
    return {"file": path, "window": plan["window"], "limit": plan["limit"]}


def begin(folder: Path, of: Mapping[str, Any]) -> bool:
    """Have a file of this checkpoint; whether there was one of another, which is gone then."""
    found = read(folder)
    if found is not None and found.get("fingerprint") == of["fingerprint"]:
        return False
    _write(folder, {**of, **{section: {} for section in SECTIONS}})
    return found is not None


def has(folder: Path, section: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether it was measured so."""
    found = read(folder) or {}
    entry = found.get(section, {}).get(name)
    return isinstance(entry, dict) and entry.get("settings") == dict(settings)


def add(
    folder: Path, section: str, name: str, settings: Mapping[str, Any], command: str, said: Mapping[str, Any]
) -> None:
    """Note a measurement, in place of an earlier one under that name."""
    found = read(folder)
    assert found is not None
    versions = {"polycom-ext": __version__, **{name: version(name) for name in LIBRARIES if _has(name)}}
    ended = datetime.now().astimezone().isoformat(timespec="seconds")
    entry = {"settings": dict(settings), **said, "versions": versions, "command": command, "ended": ended}
    found[section][name] = entry
    _write(folder, found)


def value(name: str, entry: Mapping[str, Any]) -> float | None:
    """What is quoted of a task: the paper's metric, else accuracy, else the first that there is."""
    scores = entry["results"].get("groups", {}).get(name) or entry["results"]["results"].get(name) or {}
    known = published.tasks().get(name)
    plain = {
        key.partition(",")[0]: one for key, one in scores.items() if not key.startswith(("alias", "sample"))
    }
    for metric in (known.metric if known else "", "acc", *plain):
        if isinstance(plain.get(metric), float | int):
            return float(plain[metric])
    return None


def fingerprint(folder: Path) -> str:
    """Of the names, sizes and times of a checkpoint's files."""
    stats = [
        (path.relative_to(folder).as_posix(), path.stat())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    told = "\n".join(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()


def _has(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    write_text(folder / EVALUATION, json.dumps(content, indent=2) + "\n")
