"""Node 0, where the others call."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from polycom_ext.runs.launch import Ending
from polycom_ext.runs.lobby import (
    FAILED,
    POLL_SECONDS,
    REFUSED,
    End,
    Entry,
    LookFor,
    Parted,
    Present,
    Verdict,
    check,
    how,
    never,
)
from polycom_ext.runs.lobby.network import Address, free_port, interface_of, listen
from polycom_ext.runs.lobby.wire import Exchange, Message, Peer

COURT_SECONDS = 1.5
"""When one trainer has failed those of other nodes fail by it: so long is waited for who was first."""
LEAVE_SECONDS = 5.0
"""Within this the others have read how the run has ended."""


class Host:
    """Node 0, among the others. Raises Parted where it cannot listen."""

    def __init__(self, at: Address, run: str, nodes: int, silence: float) -> None:
        self.verdict: Verdict | None = None
        self._at, self._run, self._nodes, self._silence = at, run, nodes, silence
        self._guests: dict[int, Peer] = {}
        self._facts: dict[int, Mapping[str, Any]] = {}
        self._absent: set[int] = set()
        self._ends: dict[int, tuple[End, float]] = {}
        self._told_signal = False
        self._announced = False
        try:
            listener = listen(at.port)
        except OSError as error:
            raise Parted(
                f"node 0 cannot listen at {at}: {error.strerror}; give --rendezvous a free port of it"
            ) from None
        self._exchange = Exchange(silence, listener)
        self._exchange.start()

    def gather(
        self,
        facts: Mapping[str, Any],
        wait: float,
        ending: Ending,
        look_for: LookFor = never,
    ) -> Present:
        """Wait until all are there. Raises Parted where some do not come, Stopped, and what look_for does."""
        deadline = time.monotonic() + wait
        while len(self._guests) < self._nodes - 1:
            self._look(look_for)
            self.attend(ending, POLL_SECONDS)
            if self.verdict is not None:
                raise Parted(self.verdict.sentence)
            check(ending)
            if time.monotonic() > deadline:
                missing = [rank for rank in range(1, self._nodes) if rank not in self._guests]
                raise Parted(f"{_named(missing)} did not call {self._at} within {wait:g} s")
        guests = {rank: (guest.host, self._facts[rank]) for rank, guest in sorted(self._guests.items())}
        return {0: (platform.node(), facts), **guests}

    def _look(self, look_for: LookFor) -> None:
        for rank in range(1, self._nodes):
            if rank not in self._guests:
                try:
                    look_for(rank)
                except Exception:
                    self._absent.add(rank)
                    raise

    def open(self, attempt: int) -> Entry:
        """Let all of them go."""
        entry = self._entry(attempt)
        self._tell(go=entry.store.port, attempt=attempt)
        return entry

    def measure(self) -> Entry:
        """Have all of them start the measurement of their network, which is a run of its own."""
        entry = self._entry(0)
        self._tell(measure=entry.store.port)
        return entry

    def attend(self, ending: Ending, seconds: float = 0.0) -> None:
        """Take what the others have said, and end the trainer if one of them has failed."""
        self._tell_signal(ending)
        while (got := self._exchange.next(seconds)) is not None:
            self._take(*got, ending)
            seconds = 0.0
        bad = [since for end, since in self._ends.values() if end.is_bad]
        if self.verdict is None and bad and ending.signal is None:
            late = time.monotonic() - min(bad) > COURT_SECONDS
            if late or len(self._ends) == self._nodes:
                self.verdict = self._blame()
        if self.verdict is not None:
            self._announce(self.verdict)
            ending.end_at_once()

    def ended(self, end: End, ending: Ending) -> Verdict | None:
        """This node's trainer has ended; wait for the others', and say what became of all of them."""
        self._ends[0] = (end, time.monotonic())
        self._tell_signal(ending)
        while True:
            self.attend(ending, POLL_SECONDS)  # first: the last one to end may be this one
            present = [rank for rank, guest in self._guests.items() if not guest.gone]
            all_ended = all(rank in self._ends for rank in present)
            if self.verdict is not None or ending.is_impatient or all_ended:
                return self.verdict

    def leave(self, verdict: Verdict) -> None:
        """Tell the others how it has ended, and go once they have heard it."""
        self._announce(verdict)
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline and any(not guest.gone for guest in self._guests.values()):
            self._exchange.next(POLL_SECONDS)
        self._exchange.close()

    def turn_away(self, sentence: str, ending: Ending) -> None:
        """Tell the others, as they come, why there will be no run; for as long as a node may be silent."""
        deadline = time.monotonic() + self._silence
        coming = self._nodes - 1 - len(self._absent)
        while time.monotonic() < deadline and len(self._guests) < coming and ending.signal is None:
            self.attend(ending, POLL_SECONDS)
        self.leave(Verdict(REFUSED, sentence, 0))

    def _entry(self, attempt: int) -> Entry:
        reached = next(iter(self._guests.values())).connection.getsockname()[0].removeprefix("::ffff:")
        return Entry(self._at.host, interface_of(reached), Address(self._at.host, free_port()), attempt)

    def _take(self, peer: Peer, message: Message, ending: Ending) -> None:
        if peer.rank is None:
            with contextlib.suppress(KeyError, TypeError):  # of what is no node
                self._greet(peer, message)
        elif not message:
            if peer.rank not in self._ends and ending.signal is None and self.verdict is None:
                self.verdict = Verdict(FAILED, f"{peer} is lost: {peer.gone}", peer.rank)
        elif "signal" in message:
            ending.pass_on(message["signal"])
        elif "ended" in message:
            self._ends[peer.rank] = (End(**message["ended"]), time.monotonic())

    def _greet(self, peer: Peer, message: Message) -> None:
        hello = message["hello"]
        rank, facts = int(hello["rank"]), {**hello["facts"], "ahead": hello["now"] - message["arrived"]}
        other = self._guests.get(rank)
        if hello["run"] != self._run:
            sentence = f"at {self._at} the nodes of {self._run} meet, not those of {hello['run']}"
            peer.send(over=asdict(Verdict(REFUSED, f"{sentence}: give another free port of node 0", rank)))
        elif self.verdict is not None:
            peer.send(later="the attempt before has not ended yet", taken=False)
        elif other is not None:
            sentence = f"{other} is there already, so this one, on {hello['host']}, is one too many"
            peer.send(later=sentence, taken=True)
        else:
            peer.rank, peer.host = rank, hello["host"]
            self._guests[rank] = peer
            self._facts[rank] = facts

    def _announce(self, verdict: Verdict) -> None:
        if not self._announced:
            self._announced = True
            self._tell(over=asdict(verdict))

    def _blame(self) -> Verdict:
        """Who was first; what a signal has killed did not fail by another's end."""
        bad = {rank: (end.status >= 0, since, end) for rank, (end, since) in self._ends.items() if end.is_bad}
        for rank, (_, _, end) in sorted(bad.items()):
            if end.refusal is not None:
                return Verdict(REFUSED, end.refusal, rank, end.status)
        rank, (_, _, end) = min(bad.items(), key=lambda item: item[1][:2])
        name = self._guests[rank] if rank else f"node 0 ({platform.node()})"
        return Verdict(FAILED, f"the trainer of {name} {how(end.status)}", rank, end.status)

    def _tell_signal(self, ending: Ending) -> None:
        if ending.signal is not None and not self._told_signal:
            self._told_signal = True
            self._tell(signal=ending.signal)

    def _tell(self, **message: Any) -> None:
        for guest in self._guests.values():
            guest.send(**message)


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:-1]))
    return f"nodes {names} and {ranks[-1]}" if names else f"node {ranks[-1]}"
