"""What a trainer's entry owes to its run: to say in its record why it will not train, and to hear a stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from polycom_ext import files
from polycom_ext.runs import record

RUN_DIR = "POLYCOM_RUN_DIR"
"""Environment variable of a worker that `polycom node` has started: the run's directory."""
STOP = signal.SIGUSR1
"""By which a worker that handles it is asked to save a checkpoint and to end with status 0. SIGTERM comes
from torchrun, too: to those whose neighbour has failed, and who have nobody to save with."""
DISK_FULL = os.EX_IOERR
"""Exit status of a worker that could not write what it had to: a disk with no room holds no word of it."""
ERROR_MARK = "polycom: error: "
"""Begins the line that says on standard error why a run was refused."""


def refuse(reason: str) -> None:
    """Say why this trainer will not run, before it exits with status 2. Any rank may, and all of them."""
    note_refusal(reason)
    print(f"{ERROR_MARK}{' '.join(reason.split())}", file=sys.stderr, flush=True)


def note_refusal(reason: str) -> None:
    """Only record it; of a worker that `polycom node` did not start there is no record."""
    run_dir = os.environ.get(RUN_DIR)
    if run_dir:
        with contextlib.suppress(OSError):  # a full disk
            record.refuse(Path(run_dir), reason)


def note_what_argparse_refuses() -> None:
    """Have each of this process's parsers record what it cannot parse; it says so and exits as before."""
    tell = argparse.ArgumentParser.error

    def error(parser: argparse.ArgumentParser, message: str) -> None:
        note_refusal(message)
        tell(parser, message)

    argparse.ArgumentParser.error = error  # type: ignore[assignment,method-assign]


@contextlib.contextmanager
def watching_the_disk() -> Iterator[None]:
    """End this worker with DISK_FULL where what is raised within comes of the run's disk being full.

    Writers raise this and that for it, torch's what is no Exception, and a log on that disk takes none of it.
    """
    try:
        yield
    except BaseException as error:
        run_dir = os.environ.get(RUN_DIR)
        ends_well = isinstance(error, SystemExit) and not error.code
        if ends_well or not run_dir or not any(map(files.is_full, _places(record.Record(Path(run_dir))))):
            raise
        with contextlib.suppress(OSError):
            traceback.print_exc()
        os._exit(DISK_FULL)  # whatever else would be written at the end


def _places(run: record.Record) -> list[Path]:
    """Where a run writes: its checkpoints may lie elsewhere."""
    return [place for place in (run.path, run.checkpoints) if place.is_dir()]


def hear_stop() -> Callable[[], bool]:
    """Handle STOP from now on; returns what says whether it came. Ranks have yet to agree on it."""
    came: list[int] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    signal.signal(STOP, hear)
    return lambda: bool(came)
