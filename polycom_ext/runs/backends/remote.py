"""Shell scripts on hosts, by ssh: short questions, and the nodes of a run.

A script goes to `sh -s` on ssh's standard input, so that nothing in it meets the login shell of the host, or
stands on a command line for all to read.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from signal import SIGHUP, Signals
from typing import IO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import node

OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)
"""Of every call; ssh takes the first of two that contradict, and a site's own come first."""
ANSWER_SECONDS = 60.0
"""How long a short question may take."""
SSH_FAILED = 255
"""ssh's exit status for its own failures."""
PORTS = range(10_000, 60_000)


@dataclass(frozen=True)
class Host:
    """A machine that runs shell scripts."""

    name: str | None = None
    """[USER@]HOST; None for this machine."""
    options: tuple[str, ...] = ()
    """The ssh client's."""

    def __str__(self) -> str:
        return "this machine" if self.name is None else self.name

    @property
    def shell(self) -> list[str]:
        """The command that runs a script which it reads from its standard input."""
        if self.name is None:
            return ["/bin/sh", "-s"]
        return ["ssh", *self.options, *OPTIONS, "--", self.name, "exec /bin/sh -s"]

    def address(self) -> str:
        """What other hosts call it: its name, after ssh's configuration has had its say."""
        if self.name is None:
            return "127.0.0.1"
        said = _ssh(["ssh", *self.options, "-G", "--", self.name], "", ANSWER_SECONDS)
        found = re.search(r"^hostname (.+)$", said.stdout, re.MULTILINE)
        name = found[1] if found else self.name.rpartition("@")[2]
        return f"[{name}]" if ":" in name else name

    def ask(self, script: str, seconds: float = ANSWER_SECONDS) -> str:
        """What a script prints, given so many seconds.

        Raises PolycomError that names the host, where it cannot be reached or the script fails.
        """
        try:
            done = _ssh(self.shell, script, seconds)
        except subprocess.TimeoutExpired:
            raise PolycomError(f"host {self} did not answer within {seconds:.0f} s") from None
        said = " ".join(done.stderr.split())
        if done.returncode == SSH_FAILED and self.name is not None:
            raise PolycomError(f"host {self} cannot be reached by ssh: {said or 'it closed the connection'}")
        if done.returncode:
            raise PolycomError(f"host {self}: {said or f'exit status {done.returncode}'}")
        return done.stdout


def ask_all(hosts: Sequence[Host], script: str) -> None:
    """Ask all at once; raise PolycomError for the first one that fails."""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        list(pool.map(lambda host: host.ask(script), hosts))


def free_port(host: Host) -> int:
    """A port on which nothing listens there, and which nothing is given by chance."""
    said = host.ask("cat /proc/sys/net/ipv4/ip_local_port_range /proc/net/tcp /proc/net/tcp6 2>/dev/null; :")
    first_line, *table = said.splitlines()
    low, high = map(int, first_line.split())
    taken = {int(port, 16) for line in table for port in re.findall(r"^ *\d+: \w+:(\w{4}) ", line)}
    free = [port for port in PORTS if port not in taken and not low <= port <= high]
    return random.choice(free)


class Nodes:
    """The nodes of a run, each a shell script on its host, which goes on if this process ends.

    They begin when their status is first asked for: then the one that has planned the run has let go of its
    directory.
    """

    def __init__(
        self, run_name: str, scripts: Sequence[tuple[Host, str]], pass_on: Callable[[int, str], str]
    ) -> None:
        """Nothing is started yet.

        Args:
            scripts: where each node runs, the first one first, and what.
            pass_on: the script that gives the node of a rank a signal, by its name.
        """
        self._name = run_name
        self._scripts = scripts
        self._pass_on = pass_on
        self._received: list[int] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._lost: set[int] = set()

    def status(self) -> int | None:
        """The first node's status, as all end alike; that of the others where it does not say."""
        if not self._processes:
            if self._received:
                return 128 + self._received[0]
            self._begin()
        for rank, process in enumerate(self._processes):
            if process.poll() == SSH_FAILED and self._scripts[rank][0].name and rank not in self._lost:
                self._lost.add(rank)
                print(
                    f"{self._name}: the connection to node {rank} ({self._scripts[rank][0]}) is lost; what "
                    "runs there goes on",
                    file=sys.stderr,
                    flush=True,
                )
        if any(process.returncode is None for process in self._processes):
            return None
        for reader in self._readers:
            reader.join()
        known = [process.returncode for rank, process in enumerate(self._processes) if rank not in self._lost]
        failed = [status if status > 0 else 128 - status for status in known if status]
        if failed and failed[0] > 128 and self._received:
            return 128 + self._received[0]
        return failed[0] if failed else node.DONE if known else node.FAILED

    def signal(self, signum: int) -> None:
        """Pass it on; but the end of a terminal ends no run that others execute."""
        if signum == SIGHUP:
            return
        self._received.append(signum)
        for rank in range(len(self._processes)):
            threading.Thread(target=self._give, args=(rank, Signals(signum)), daemon=True).start()

    def _begin(self) -> None:
        for rank, (host, script) in enumerate(self._scripts):
            process = subprocess.Popen(
                host.shell,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes from here, once
            )
            self._processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and says why
                process.stdin.write(script)
                process.stdin.close()
            before = f"[node {rank} {host}] " if len(self._scripts) > 1 else ""
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=_relay, args=(source, target, before), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _give(self, rank: int, signum: Signals) -> None:
        try:
            self._scripts[rank][0].ask(self._pass_on(rank, signum.name.removeprefix("SIG")))
        except PolycomError as error:
            print(f"{self._name}: {error}", file=sys.stderr, flush=True)


def _relay(source: IO[str], target: IO[str], before: str) -> None:
    for line in source:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal stops no run
            target.write(f"{before}{line}")
            target.flush()


def _ssh(command: list[str], script: str, seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=script,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise PolycomError(
            f"there is no {os.path.basename(command[0])} here: install an ssh client"
        ) from None
