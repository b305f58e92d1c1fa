"""What `polycom eval --data NAME` asks of data of tasks that lie on this machine.

Each lies in the room of the upstream that brings it, and is found by the table in `trainers.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

HUB = "hub"
"""`--data` of the data that lm-eval itself names."""


class TaskData(Protocol):
    """Data for tasks of lm-eval's, which stay what they are but for where they read."""

    summary: str
    """What it is, for `--help`."""

    def tasks(self) -> Collection[str]:
        """The paper's tasks, by lm-eval's names, that it has data for."""

    def version(self) -> str:
        """What they are of, for the record."""

    def write(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Write what files they need into an empty folder.

        Raises PolycomError, with the way out, where the data are not on this machine.

        Returns: lm-eval's name of a task -> the keys of its configuration that take the place of its own.
        Files in it are named by their paths, those in `folder` relative to it.
        """
