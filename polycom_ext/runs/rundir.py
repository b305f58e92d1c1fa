"""A run directory: what was asked for, with what versions, and whether it may go on from what is there."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import polycom_ext
from polycom_ext import upstream
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError
from polycom_ext.files import holders, lock, write_text
from polycom_ext.runs import document, launch, secrets
from polycom_ext.runs import spec as specs
from polycom_ext.runs.adapter import Adapter, trees
from polycom_ext.runs.record import Record
from polycom_ext.runs.rendering import Command
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import Spec
from polycom_ext.upstream import git


class RunDirectory(Record):
    """The record of a run, with what it takes to start one there."""

    def check_resumable(self, spec: Spec, adapter: Adapter) -> None:
        """Raise PolycomError if the run could not go on from what is there.

        That is so where checkpoints belong to another model than the spec's, where a file cannot be read that
        says what is there, and where the directory is none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise PolycomError(f"{self.path} is a file, not a folder: give another --output")
        latest = adapter.latest_step(spec, self.path)
        self.attempts()
        if latest is None or not self.spec.exists():
            return
        before = specs.load(self.spec)
        if before.trainer != spec.trainer:
            changed = ["trainer"]
        else:
            old, new = adapter.model(before), adapter.model(spec)
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            raise PolycomError(
                f"{self.path} holds checkpoints of another model (it differs in {', '.join(changed)}); "
                "give another --output, or remove that directory"
            )

    @contextlib.contextmanager
    def locked(
        self, node_rank: int = 0, inherited: int | None = None, patience: float = 0.0
    ) -> Iterator[BinaryIO]:
        """A node's log, open for appending and locked: one run at a time in one directory.

        A trainer that inherits it holds the lock for as long as any of its processes lives. What a dead
        launch has left is ended; raises PolycomError where somebody works there.

        Args:
            inherited: descriptor of the locked log, from the process that has planned this run.
            patience: seconds that a trainer which has lost its `polycom node` is given to end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.log_of(node_rank)
        if inherited is not None:
            os.set_inheritable(inherited, False)
            with open(path, "ab", opener=lambda *_: inherited) as log:
                yield log
            return
        with path.open("ab") as log:
            deadline = time.monotonic() + patience
            while not lock(log):
                pids = holders(path)
                if (not pids or launch.end_leftovers(pids)) and _locks_soon(log):
                    break
                if time.monotonic() > deadline or not launch.are_orphans(holders(path)):
                    raise PolycomError(f"{self.path} is in use by {launch.users(holders(path))}")
                time.sleep(0.5)
            yield log

    def log_of(self, node_rank: int) -> Path:
        """The log of a node: one of its own, as file systems that nodes share may not append well."""
        return self.log.with_name(f"log.node-{node_rank}.txt") if node_rank else self.log

    def write(
        self, spec: Spec, adapter: Adapter, command: Command, site: Site, files: Mapping[str, str]
    ) -> None:
        """Write what was asked for, the command, all files and the versions, for a start or a resumption.

        Args:
            files: name -> text of what the backend needs; scripts may be executed.
        """
        resolved = spec.as_mapping()
        if "environment" in resolved:
            resolved["environment"] = secrets.masked(spec.environment)
        write_text(self.spec, document.dump(resolved))
        write_text(self.site, document.dump(site.as_mapping()))
        for name, text in {**adapter.files(spec, self.path), **files}.items():
            write_text(self.path / name, text, executable=name.endswith(".sh"))
        write_text(self.command, command.script(), executable=True)
        where = {"directory": str(self.path), "working_directory": str(command.directory)}
        versions = {**_versions(spec, adapter), **where, "attempts": self.attempts()}
        write_text(self.versions, json.dumps(versions, indent=2) + "\n")

    def check_place(self) -> None:
        """Raise PolycomError if the command was written for another directory: this is a copy."""
        planned = Path(self.read_versions().get("directory", self.path))
        if not (planned.exists() and planned.samefile(self.path)):
            raise PolycomError(
                f"{self.path} was planned as {planned}, where its command would work; plan it anew: "
                f"`polycom run {self.spec} --output {self.path}`"
            )

    def enter_working_directory(self) -> None:
        """Work where the run was planned: paths in its spec are relative to that.

        Raises PolycomError where this node does not have that directory.
        """
        where = self.read_versions().get("working_directory", os.curdir)
        try:
            os.chdir(where)
        except OSError as error:
            raise PolycomError(
                f"{self.path} was planned in {where}, which this node cannot enter: {error.strerror}; "
                "its paths are relative to that folder"
            ) from None

    def clear_metrics(self, spec: Spec, adapter: Adapter) -> None:
        """Make the metrics fit for an attempt to add to.

        Where there is no checkpoint, old ones are forgotten: this start writes all of them. Where there is
        one from which the trainer cannot go on, half-written perhaps, they are set aside.
        """
        if adapter.latest_step(spec, self.path) is not None:
            self._end_last_line()
            return
        for path in (self.metrics, self.coefficients):
            if path.exists() and self._has_checkpoints():
                path.replace(
                    path.with_name(f"{path.stem}.before-attempt-{len(self.attempts()) + 1}{path.suffix}")
                )
            path.unlink(missing_ok=True)

    def _has_checkpoints(self) -> bool:
        """Whether there is a folder of a checkpoint, whole or not."""
        return any(
            path.is_dir() and re.match(r"(iter_|step)\d", path.name) for path in self.checkpoints.glob("*")
        )

    def _end_last_line(self) -> None:
        """A killed trainer may have left a line of metrics half-written: the next one begins on its own."""
        with contextlib.suppress(FileNotFoundError), self.metrics.open("rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def is_finished(self, spec: Spec, adapter: Adapter) -> bool:
        """Whether the last step is saved and the trainer also came through what it does after it."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].get("status") == 0 and adapter.is_complete(spec, self.path)


def _versions(spec: Spec, adapter: Adapter) -> dict[str, Any]:
    return {
        "polycom-ext": __version__,
        "commit": git.commit_of(Path(polycom_ext.__file__).parent),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "platform": platform.platform(),
        "upstreams": {name: upstream.state(name) for name in trees(adapter, spec)},
    }


def _locks_soon(log: BinaryIO) -> bool:
    """Lock the log of processes that have ended: they are seen as gone a moment before their locks are."""
    deadline = time.monotonic() + 5
    while not (got := lock(log)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return got
