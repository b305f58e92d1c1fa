"""Hosts of one machine: network namespaces on a bridge, each with an address and a real sshd of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PORT = 2222


def missing() -> str:
    """Why there can be no such hosts here; nothing where there can."""
    if os.geteuid():
        return "network namespaces need root"
    commands = ("ip", "sshd", "ssh", "ssh-keygen", "setsid")
    absent = [name for name in commands if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


class Hosts:
    """Some hosts, a key that all of them take, and the words that a site needs to reach them."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._mark = folder, f"pc{os.getpid() % 100_000}"
        self._subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 256}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.names = [f"{self._subnet}.{10 + n}" for n in range(count)]
        self.options = [
            *("-F", "none", "-p", str(PORT), "-i", str(folder / "key")),
            *("-o", f"UserKnownHostsFile={folder / 'known_hosts'}", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "IdentitiesOnly=yes"),
        ]

    def start(self) -> None:
        for name in ("key", "host_key", "another_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        shutil.copy(self._folder / "key.pub", self._folder / "authorized_keys")
        public = " ".join((self._folder / "host_key.pub").read_text().split()[:2])
        known = "".join(f"[{name}]:{PORT} {public}\n" for name in self.names)
        (self._folder / "known_hosts").write_text(known)
        _run("ip", "link", "add", self._mark, "type", "bridge")
        _run("ip", "address", "add", f"{self._subnet}.1/24", "dev", self._mark)
        _run("ip", "link", "set", self._mark, "up")
        for n, name in enumerate(self.names):
            space = self._space(n)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", self._cable(n), "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", self._cable(n), "master", self._mark, "up")
            _run("ip", "-n", space, "address", "add", f"{name}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            self._daemons.append(self._sshd(n))
        for name in self.names:
            _wait_for(name)

    def end(self) -> None:
        for daemon in self._daemons:
            daemon.terminate()
            daemon.wait(10)
        for n in range(len(self.names)):
            for pid in subprocess.run(
                ["ip", "netns", "pids", self._space(n)], capture_output=True, text=True, check=False
            ).stdout.split():  # what a failed test has left there
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", self._space(n)], check=False)
        subprocess.run(["ip", "link", "delete", self._mark], check=False)

    def plug(self, n: int, state: str) -> None:
        """Have the cable of a host `up` or `down`."""
        _run("ip", "link", "set", self._cable(n), state)

    def pids(self, n: int) -> list[int]:
        """What runs there, but for its sshd."""
        listed = _run("ip", "netns", "pids", self._space(n)).split()
        return [int(pid) for pid in listed if b"sshd" not in _command_line(int(pid))]

    def command_lines(self, n: int) -> list[bytes]:
        return [_command_line(pid) for pid in self.pids(n)]

    def _space(self, n: int) -> str:
        return f"{self._mark}-{n}"

    def _cable(self, n: int) -> str:
        return f"{self._mark}v{n}"

    def _sshd(self, n: int) -> subprocess.Popen[bytes]:
        config = self._folder / f"sshd-{n}"
        lines = (
            *(f"Port {PORT}", f"ListenAddress {self.names[n]}", f"HostKey {self._folder / 'host_key'}"),
            *(f"PidFile {self._folder}/sshd-{n}.pid", f"AuthorizedKeysFile {self._folder}/authorized_keys"),
            *(
                "StrictModes no",
                "UsePAM no",
                "PasswordAuthentication no",
                "PermitRootLogin prohibit-password",
            ),
        )
        config.write_text("\n".join(lines) + "\n")
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"
        with (self._folder / f"sshd-{n}.log").open("wb") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._space(n), sshd, "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )


@contextlib.contextmanager
def running(folder: Path, count: int) -> Iterator[Hosts]:
    """Hosts for as long as the block runs."""
    separation = Path("/run/sshd")  # where sshd locks itself in
    made = not separation.exists()
    separation.mkdir(mode=0o755, exist_ok=True)
    hosts = Hosts(folder, count)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.end()
        if made:
            with contextlib.suppress(OSError):
                separation.rmdir()


def _wait_for(name: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((name, PORT), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"no sshd at {name}"
            time.sleep(0.1)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
