"""Addresses, ports and interfaces of this node."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """HOST:PORT of node 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError for what is no HOST:PORT."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ValueError(text)
        return cls(host, int(port))


def listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def free_port() -> int:
    """A port of this node that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        wanted = socket.inet_aton(address)
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                told = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if told[20:24] == wanted:
                    return name
    return None


_SIOCGIFADDR = 0x8915
