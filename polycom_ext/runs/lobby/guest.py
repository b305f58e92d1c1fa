"""Another node, which calls node 0."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.runs.launch import Ending
from polycom_ext.runs.lobby import (
    FAILED,
    POLL_SECONDS,
    REFUSED,
    SIGNALLED,
    End,
    Entry,
    LookFor,
    Parted,
    Stopped,
    Verdict,
    check,
    never,
)
from polycom_ext.runs.lobby.network import Address, interface_of
from polycom_ext.runs.lobby.wire import Exchange, Message, Peer

RETRY_SECONDS = 0.5


class Guest:
    """Another node, which has called node 0."""

    def __init__(self, at: Address, run: str, rank: int, silence: float) -> None:
        self.verdict: Verdict | None = None
        self._at, self._run, self._rank, self._silence = at, run, rank, silence
        self._exchange = Exchange(silence)
        self._host: Peer | None = None
        self._told_signal = False
        self.host_is_lost = False
        """Whether node 0 is gone without a word of how the run has ended."""

    def join(
        self,
        facts: Mapping[str, Any],
        wait: float,
        ending: Ending,
        measure: Callable[[Entry], object],
        look_for: LookFor = never,
    ) -> Entry:
        """Call node 0 and wait until all are there.

        Raises PolycomError for a refusal, Parted where node 0 does not answer or other nodes do not come,
        Stopped, and what look_for does.
        """
        deadline = time.monotonic() + wait
        patient_until = None
        while True:
            self._call(facts, deadline, wait, ending, look_for)
            told = self._wait_for_entry(ending, measure)
            if isinstance(told, Entry):
                return told
            self._exchange.close()
            now = time.monotonic()
            patient_until = patient_until or now + 1.5 * self._silence  # who is there may be gone, unnoticed
            if now > patient_until:
                raise told
            time.sleep(RETRY_SECONDS)

    def attend(self, ending: Ending, seconds: float = 0.0) -> None:
        """Take what node 0 has said, and end the trainer if the run is over."""
        self._tell_signal(ending)
        while (got := self._exchange.next(seconds)) is not None:
            self._take(got[1], ending)
            seconds = 0.0
        if self.verdict is not None:
            ending.end_at_once()

    def ended(self, end: End, ending: Ending) -> Verdict | None:
        """This node's trainer has ended; wait for what became of all of them."""
        assert self._host is not None
        self._tell_signal(ending)
        self._host.send(ended=asdict(end))
        deadline = time.monotonic() + self._silence
        while self.verdict is None and not ending.is_impatient:
            if self._host.gone or (end.is_bad and time.monotonic() > deadline):
                break
            self.attend(ending, POLL_SECONDS)
        return self.verdict

    def close(self) -> None:
        """Hang up."""
        self._exchange.close()

    def _call(
        self,
        facts: Mapping[str, Any],
        deadline: float,
        wait: float,
        ending: Ending,
        look_for: LookFor,
    ) -> None:
        while True:
            check(ending)
            look_for(0)
            try:
                connection = socket.create_connection((self._at.host, self._at.port), timeout=5.0)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    why = error.strerror or str(error)
                    raise Parted(f"node 0 did not answer at {self._at} within {wait:g} s: {why}") from None
            time.sleep(RETRY_SECONDS)
        self._own = connection.getsockname()[0]
        self._exchange = Exchange(self._silence)
        self._host = self._exchange.add(connection)
        self._host.rank, self._host.host = 0, self._at.host
        self._exchange.start()
        who = {"run": self._run, "rank": self._rank, "host": platform.node()}
        self._host.send(hello={**who, "facts": dict(facts), "now": time.time()})

    def _wait_for_entry(
        self, ending: Ending, measure: Callable[[Entry], object]
    ) -> Entry | PolycomError | Parted:
        """The entry, or why there is none yet."""
        assert self._host is not None
        while True:
            self._tell_signal(ending)
            check(ending)
            got = self._exchange.next(POLL_SECONDS)
            if got is None:
                continue
            message = got[1]
            if not message:
                raise Parted(f"node 0 at {self._at} is lost: {self._host.gone}")
            elif "later" in message:
                return (PolycomError if message["taken"] else Parted)(message["later"])
            elif "measure" in message:
                measure(self._entry(message["measure"], 0))
            elif "go" in message:
                return self._entry(message["go"], message["attempt"])
            else:
                self._take(message, ending)
                self._raise_verdict(ending)

    def _raise_verdict(self, ending: Ending) -> None:
        if self.verdict is None:
            return
        if self.verdict.status > SIGNALLED:
            ending.pass_on(self.verdict.status - SIGNALLED)
            raise Stopped
        raise (PolycomError if self.verdict.status == REFUSED else Parted)(self.verdict.sentence)

    def _entry(self, port: int, attempt: int) -> Entry:
        return Entry(self._own, interface_of(self._own), Address(self._at.host, port), attempt)

    def _take(self, message: Message, ending: Ending) -> None:
        assert self._host is not None
        if not message:
            if self.verdict is None and ending.signal is None:
                self.host_is_lost = True
                self.verdict = Verdict(FAILED, f"{self._host} is lost: {self._host.gone}", 0)
        elif "signal" in message:
            self._told_signal = True
            ending.pass_on(message["signal"])
        elif "over" in message:
            self.verdict = Verdict(**message["over"])

    def _tell_signal(self, ending: Ending) -> None:
        if ending.signal is not None and not self._told_signal and self._host is not None:
            self._told_signal = True
            self._host.send(signal=ending.signal)
