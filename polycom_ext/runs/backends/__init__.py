"""Where runs are executed: each backend starts `polycom node RUN_DIR` on the nodes of a planned run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO, Protocol

from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs.plan import Run

BACKENDS = {
    "local": "polycom_ext.runs.backends.local:Local",
    "slurm": "polycom_ext.runs.backends.slurm:Slurm",
    "docker": "polycom_ext.runs.backends.docker:Docker",
    "kubernetes": "polycom_ext.runs.backends.kubernetes:Kubernetes",
    "ssh": "polycom_ext.runs.backends.ssh:Ssh",
}
"""`--backend`, and `backend:` of a site -> its class, imported when it is asked for."""


class Submitted(Protocol):
    """A run that was handed over."""

    def status(self) -> int | None:
        """What `polycom run` is to return for it; None as long as it has to be waited for."""

    def signal(self, signum: int) -> None:
        """Pass on a signal that asks it to end."""


@dataclass(frozen=True)
class Standing:
    """A job that a job system has."""

    said: str
    """How it stands, in that system's words: a clause."""
    is_at_work: bool
    """Whether its nodes have begun and not ended; if not, they are to start, perhaps again."""


class Backend(Protocol):
    """One way to start the nodes of a run. What it needs of the place stands in `run.site`."""

    def files(self, run: Run) -> dict[str, str]:
        """Name -> text of what is rendered into the run directory before each start; a dry run shows it.

        Raises PolycomError for what this backend could not do.
        """

    def check(self, run: Run) -> None:
        """Raise PolycomError where the run cannot be handed over now; asked before its record is written."""

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        """Hand over a run whose record is written; the signals that end a run are held back meanwhile.

        What `stop` has to know goes into the record, by `write_job`.

        Args:
            log: the run's log, open and locked. Whoever inherits it holds the directory without a gap.
        """

    def standing(self, job: Mapping[str, Any]) -> Standing | None:
        """What a job system says of a job that has not ended; None where it has none, or cannot be asked.

        Args:
            job: as `submit` has noted it.
        """

    def stop(self, run: Run) -> None:
        """Have a run that was handed over end, which is said. Raises PolycomError where there is none."""


def find(name: str) -> Backend:
    """The backend of that name. Raises PolycomError for a name that has none."""
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise PolycomError(f"unknown backend {name!r}{did_you_mean(name, BACKENDS)}; known: {known}")
    module, _, backend = BACKENDS[name].partition(":")
    made: Backend = getattr(import_module(module), backend)()
    return made
