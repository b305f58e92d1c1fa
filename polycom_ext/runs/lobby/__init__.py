"""Where the nodes of a run meet before it starts, and watch over one another until it has ended.

Node 0 listens at the rendezvous. Each other node calls, says who it is and what it has, and is told to go, or
why not. The connections stay: a node that is gone, silent or has failed ends the run on all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polycom_ext.runs.launch import Ending
from polycom_ext.runs.lobby.network import Address

POLL_SECONDS = 0.1

DONE, FAILED, REFUSED, SIGNALLED = 0, 1, 2, 128
"""Exit statuses: complete; the trainer failed; a person must change something first, as one sentence says.
128 + SIGNAL: stopped by that signal, to be gone on with from the last checkpoint."""


class Parted(Exception):
    """Nodes have not found together; says which ones, and where."""


class Stopped(Exception):
    """A signal came while the nodes waited for one another."""


@dataclass(frozen=True)
class Entry:
    """What a node is told when all are there."""

    own: str
    """Its own address, as the others reach it."""
    interface: str | None
    """The network interface of that address, where it can be told."""
    store: Address
    """Where torchrun's store is, on node 0."""
    attempt: int


@dataclass(frozen=True)
class End:
    """How the trainer of a node has ended."""

    status: int
    signal: int | None = None
    refusal: str | None = None

    @property
    def is_bad(self) -> bool:
        """Whether it did so by itself, and not well."""
        return self.status != 0 and self.signal is None


@dataclass(frozen=True)
class Verdict:
    """How the run has ended for all of its nodes."""

    status: int
    sentence: str = ""
    rank: int | None = None
    """Of the node that was first."""
    ended: int = FAILED
    """As its trainer's exit status, where it has one."""


Present = dict[int, tuple[str, Mapping[str, Any]]]
"""rank -> (host, what it has said of itself)"""


LookFor = Callable[[int], object]
"""Asked of a rank that is waited for; raises where that node does not come."""


def never(rank: int) -> None:
    """Where nothing tells that."""


class Alone:
    """The node of a run on one."""

    verdict = None

    def attend(self, ending: Ending) -> None:
        """Nobody else has anything to say."""

    def ended(self, end: End, ending: Ending) -> None:
        """Nobody is waited for."""

    def leave(self, verdict: Verdict) -> None:
        """Nobody is told."""

    def turn_away(self, sentence: str, ending: Ending) -> None:
        """Nobody comes."""


def how(status: int) -> str:
    """How a trainer with this exit status has ended, as the end of a sentence."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"failed with exit status {status}"


def check(ending: Ending) -> None:
    if ending.signal is not None:
        raise Stopped
