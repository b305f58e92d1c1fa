"""Where runs are executed: each backend starts `polycom node RUN_DIR` on the nodes of a planned run."""

from __future__ import annotations

from importlib import import_module
from typing import BinaryIO, Protocol

from polycom_ext.runs.plan import Run

BACKENDS = {"local": "polycom_ext.runs.backends.local:Local"}
"""name -> its class, imported when it is asked for."""


class Submitted(Protocol):
    """A run that was handed over."""

    def status(self) -> int | None:
        """What `polycom run` is to return for it; None as long as it has to be waited for."""

    def signal(self, signum: int) -> None:
        """Pass on a signal that asks it to end."""


class Backend(Protocol):
    """One way to start the nodes of a run."""

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        """Hand over a run whose record is written; the signals that end a run are held back meanwhile.

        Args:
            log: the run's log, open and locked. Whoever inherits it holds the directory without a gap.
        """


def find(name: str) -> Backend:
    """The backend of that name."""
    module, _, backend = BACKENDS[name].partition(":")
    made: Backend = getattr(import_module(module), backend)()
    return made
