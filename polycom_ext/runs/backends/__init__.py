"""Where runs are executed: each backend starts `polycom node RUN_DIR` on the nodes of a planned run."""

from __future__ import annotations

from importlib import import_module
from typing import BinaryIO, Protocol

from polycom_ext.runs.plan import Run

BACKENDS = {"local": "polycom_ext.runs.backends.local:Local"}
"""name -> its class, imported when it is asked for."""


class Backend(Protocol):
    """One way to start the nodes of a run."""

    def submit(self, run: Run, log: BinaryIO) -> int:
        """Hand over a run whose record is written; what it returns is the exit status of `polycom run`.

        Args:
            log: the run's log, open and locked. Whoever inherits it holds the directory without a gap.
        """


def find(name: str) -> Backend:
    """The backend of that name."""
    module, _, backend = BACKENDS[name].partition(":")
    made: Backend = getattr(import_module(module), backend)()
    return made
