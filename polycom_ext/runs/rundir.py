"""A run directory: what was asked for, with what versions, and whether it may go on from what is there."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import polycom_ext
from polycom_ext import upstream
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.files import lock, write_text
from polycom_ext.runs import document
from polycom_ext.runs import spec as specs
from polycom_ext.runs.rendering import Command
from polycom_ext.runs.spec import Spec
from polycom_ext.runs.trainer import Trainer


class RunDirectory:
    """The files of one run that this room writes: run.yaml, command.sh, versions.json, log.txt, and those
    that the trainer's adapter names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self._spec = path / "run.yaml"
        self._versions = path / "versions.json"

    def check_resumable(self, spec: Spec, trainer: Trainer) -> None:
        """Raise PolycomError if checkpoints are there that belong to another model than the spec's."""
        if not self._spec.exists() or trainer.latest_step(spec, self.path) is None:
            return
        before = specs.load(self._spec)
        if before.trainer != spec.trainer:
            changed = ["trainer"]
        else:
            old, new = trainer.model(before), trainer.model(spec)
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            raise PolycomError(
                f"{self.path} holds checkpoints of another model (it differs in {', '.join(changed)}); "
                "give another --output, or remove that directory"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[BinaryIO]:
        """The log, open for appending and locked: one run at a time in one directory.

        A trainer that inherits it holds the lock for as long as any of its processes lives.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            if not lock(log):
                raise PolycomError(
                    f"{self.path} is in use by another run; wait for its end or give another --output"
                )
            yield log

    def write(self, spec: Spec, trainer: Trainer, command: Command) -> None:
        """Write the resolved spec, the command, its files and the versions.

        Without checkpoints, forget old metrics.
        """
        write_text(self._spec, document.dump(spec.as_mapping()))
        for name, text in trainer.files(spec, self.path).items():
            write_text(self.path / name, text)
        write_text(self.path / "command.sh", command.script(), executable=True)
        write_text(
            self._versions, json.dumps({**_versions(trainer), "attempts": self._attempts()}, indent=2) + "\n"
        )
        if trainer.latest_step(spec, self.path) is None:
            self.metrics.unlink(missing_ok=True)
            (self.path / "coefficients.json").unlink(missing_ok=True)

    def write_coefficients(self, learned: dict[str, Any] | None) -> None:
        """Write what the activations have learned, unless the trainer has done it."""
        if learned is not None:
            write_text(self.path / "coefficients.json", json.dumps(learned, indent=2) + "\n")

    def begin_attempt(self, log: BinaryIO, from_step: int | None) -> None:
        """Note in versions.json and the log that the trainer is started, and from which checkpoint."""
        attempt = {"started": _now(), "from_step": from_step}
        self._write_attempts([*self._attempts(), attempt])
        log.write(f"==== {attempt['started']}: attempt {len(self._attempts())} ====\n".encode())
        log.flush()

    def end_attempt(self, status: int) -> None:
        """Note the exit status of the attempt that was begun last."""
        *earlier, last = self._attempts()
        self._write_attempts([*earlier, {**last, "ended": _now(), "status": status}])

    def is_finished(self, spec: Spec, trainer: Trainer) -> bool:
        """Whether the last step is saved and the trainer also came through what it does after it."""
        attempts = self._attempts()
        return bool(attempts) and attempts[-1].get("status") == 0 and trainer.is_complete(spec, self.path)

    def _attempts(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads(self._versions.read_text(encoding="utf-8"))["attempts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def _write_attempts(self, attempts: list[dict[str, Any]]) -> None:
        versions = json.loads(self._versions.read_text(encoding="utf-8"))
        write_text(self._versions, json.dumps({**versions, "attempts": attempts}, indent=2) + "\n")


def _versions(trainer: Trainer) -> dict[str, Any]:
    return {
        "polycom-ext": __version__,
        "commit": _checkout_commit(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "platform": platform.platform(),
        "upstreams": {name: upstream.state(name) for name in trainer.upstreams},
    }


def _checkout_commit() -> str | None:
    """Commit of the checkout that this package lies in, `+changes` if it differs; None if it is in none."""
    package = Path(polycom_ext.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
