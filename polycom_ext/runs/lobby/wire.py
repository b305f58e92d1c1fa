"""Messages between the nodes of a run: JSON, a line each, and who was not heard from for too long."""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

BEATS = 6
"""So many signs of life are sent in the time after which silence counts as death."""
TURN_SECONDS = 0.2
SEND_SECONDS = 5.0
LONGEST = 1 << 22
"""Bytes of a message: more are no node's."""

Message = dict[str, Any]


@dataclass(eq=False)
class Peer:
    """The other end of a connection."""

    connection: socket.socket
    rank: int | None = None
    """None until it has said who it is."""
    host: str = ""
    heard: float = field(default_factory=time.monotonic)
    gone: str = ""
    """Why it is given up, a clause."""
    _unread: bytes = b""
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return f"node {self.rank} ({self.host})"

    def send(self, **message: Any) -> None:
        """Send a message. What does not arrive shows when nothing more is heard from there."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """The messages that have arrived; raises OSError or ValueError at the end of them."""
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionError
        self.heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > LONGEST:
            raise ValueError
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError
        return messages


class Exchange(threading.Thread):
    """Keeps the connections of one node: a thread, so that a node is heard from however busy it is.

    What has come is in `inbox`, an empty message where a peer is given up.
    """

    def __init__(self, silence: float, listener: socket.socket | None = None) -> None:
        super().__init__(name="lobby", daemon=True)
        self.inbox: queue.SimpleQueue[tuple[Peer, Message]] = queue.SimpleQueue()
        self._silence = silence
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._peers: list[Peer] = []
        self._closing = threading.Event()
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ)

    def add(self, connection: socket.socket) -> Peer:
        """Take a connection into care; before `start`, or by this thread itself."""
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def next(self, seconds: float) -> tuple[Peer, Message] | None:
        """What has come first, waited for no longer than this."""
        with contextlib.suppress(queue.Empty):
            return self.inbox.get(timeout=seconds) if seconds > 0 else self.inbox.get_nowait()
        return None

    def close(self) -> None:
        """End all connections; others read to the end of what they were sent."""
        self._closing.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        beaten = time.monotonic()
        while not self._closing.is_set():
            for key, _ in self._selector.select(TURN_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - beaten > self._silence / BEATS:
                beaten = now
                for peer in self._peers:
                    peer.send(beat=True)
            for peer in [one for one in self._peers if now - one.heard > self._silence]:
                self._give_up(peer, f"nothing was heard from it for {self._silence:g} s")
        for peer in list(self._peers):
            self._give_up(peer, "this node has ended")
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self.add(self._listener.accept()[0])

    def _read(self, peer: Peer) -> None:
        try:
            messages = peer.receive()
        except (OSError, ValueError):
            self._give_up(peer, "its connection was closed")
            return
        for message in messages:
            if "beat" not in message:
                self.inbox.put((peer, {**message, "arrived": time.time()}))

    def _give_up(self, peer: Peer, why: str) -> None:
        peer.gone = why
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self.inbox.put((peer, {}))
