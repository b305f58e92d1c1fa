"""`prepare` in processes of its own, beside threads that do something else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from polycom_ext.data import shards
from polycom_ext.data.prepare import prepare
from polycom_ext.data.settings import Settings
from polycom_ext.errors import PolycomError
from polycom_ext.files import lock


class Aside:
    """Prepares data sets, each in its process; threads may share it."""

    def __init__(self) -> None:
        # As in `shards`: a fork of this process would copy whatever threads it has.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([shards.__name__, __name__])
        self._processes: set[ForkServerProcess] = set()
        self._ended = False

    def prepare(self, settings: Settings) -> None:
        """As `prepare`, and shows nothing. Raises what that raises, or PolycomError if its process died."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_prepare, args=(settings, theirs))
        process.start()
        self._processes.add(process)
        if self._ended:
            process.terminate()
        theirs.close()
        try:
            error = ours.recv()
        except EOFError:
            error = PolycomError(
                f"the process that tokenized {settings.inputs[0]} died, perhaps for want of memory; "
                "give the same command again, with fewer --workers, to go on"
            )
        finally:
            process.join()
            self._processes.discard(process)
            ours.close()
        if error is not None:
            raise error

    def end(self) -> None:
        """End what is under way or begins later."""
        self._ended = True
        for process in list(self._processes):
            process.terminate()


def _prepare(settings: Settings, answer: Connection) -> None:
    """What a process does: a data set, and None or the error to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=shards.end_with_parent, daemon=True).start()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the parent shows how far all are
    error: Exception | None = None
    try:
        settings.work.mkdir(parents=True, exist_ok=True)
        with (settings.work / "lock").open("wb") as held:
            lock(held, wait=True)  # for one whose parent was killed a moment ago
        prepare(settings)
    except Exception as problem:
        error = problem
    answer.send(error)
