"""Keep the newest checkpoints of a run and remove those before them, while it trains."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

from polycom_ext.errors import PolycomError
from polycom_ext.runs.plan import Run

EVERY_SECONDS = 30.0
"""So often it is looked whether there are more."""
REMOVING = "removing-"
"""Begins the name of a folder that is being removed: half of it is no checkpoint."""


class Keeper:
    """Removes what is older than the `keep_checkpoints` newest whole ones, beside the caller's own work."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next = time.monotonic() + EVERY_SECONDS
        self._thread: threading.Thread | None = None

    def __call__(self) -> None:
        """To be called again and again; at most one looks at a time."""
        if self._run.spec.keep_checkpoints is None or time.monotonic() < self._next:
            return
        if self._thread is None or not self._thread.is_alive():
            self._next = time.monotonic() + EVERY_SECONDS
            self._thread = threading.Thread(target=prune, args=(self._run,), daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait for the one that is at work, and look a last time."""
        if self._thread is not None:
            self._thread.join()
        prune(self._run)


def prune(run: Run) -> None:
    """Remove the whole checkpoints that are older than the newest of them; what is not whole stays."""
    keep, folder = run.spec.keep_checkpoints, run.directory.checkpoints
    if keep is None:
        return
    with contextlib.suppress(OSError, PolycomError):
        for left in folder.glob(f"{REMOVING}*"):
            shutil.rmtree(left, ignore_errors=True)
        whole = run.adapter.checkpoints(run.spec, run.directory.path)
        kept = sorted({step for step, _ in whole}, reverse=True)[:keep]
        for step, path in whole:
            if step not in kept and not path.is_symlink():
                shutil.rmtree(path.rename(path.with_name(f"{REMOVING}{path.name}")), ignore_errors=True)
