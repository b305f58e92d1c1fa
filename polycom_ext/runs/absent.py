"""Nodes that will not come: what each leaves in the run's directory, so that the others do not wait for it.

The lobby hears of a node once that calls. One whose container engine or set-up has failed never does, nor
does one that is refused before: node.sh, job.sh or `polycom node` writes a file of three lines then, the
rendezvous of its start, an exit status and a sentence. Another start has another rendezvous.
"""

from __future__ import annotations

import contextlib
import platform

from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.runs.lobby import REFUSED, Parted
from polycom_ext.runs.record import Record

NOTHING_RAN = (125, 126, 127)
"""Exit statuses by which container engines and shells say so; starting again would not help."""


def note(run: Record, rank: int, rendezvous: str, sentence: str) -> None:
    """Say why a node is refused before it has called the others."""
    with contextlib.suppress(OSError):
        write_text(run.absent(rank), f"{rendezvous}\n{REFUSED}\n{platform.node()}: {sentence}\n")


def clear(run: Record) -> None:
    """Forget what was left by an earlier start, of all nodes."""
    for path in run.path.glob(run.absent("*").name):
        path.unlink(missing_ok=True)


def check(run: Record, rank: int, rendezvous: str) -> None:
    """Raise PolycomError where this node will not come, Parted where it may be started again."""
    path = run.absent(rank)
    try:
        start, status, sentence = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):  # not there, or half-written
        return
    if start == rendezvous:
        path.unlink(missing_ok=True)
        final = int(status) in (REFUSED, *NOTHING_RAN)
        raise (PolycomError if final else Parted)(f"node {rank} does not come: {sentence}")
