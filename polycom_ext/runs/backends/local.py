"""The backend `local`: a run on this machine, as a child that goes on if this process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import BinaryIO

from polycom_ext.runs import node, secrets
from polycom_ext.runs.backends import Submitted
from polycom_ext.runs.plan import Run


class Local:
    """Starts the one node of a run; of a run on several nodes it says how to start them."""

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        if run.spec.nodes > 1:
            print(
                f"{run.name}: planned for {run.spec.nodes} nodes, and this machine is one; give on each, "
                f"with R from 0 to {run.spec.nodes - 1} and a free port of node 0:\n"
                f"    polycom node {run.directory.path} --node-rank R --rendezvous HOST:PORT"
            )
            return _Told()
        sys.stdout.flush()
        return _Child(run, log)


class _Told:
    """Others start it."""

    def status(self) -> int:
        return node.DONE

    def signal(self, signum: int) -> None: ...


class _Child:
    """The node, a child of this process."""

    def __init__(self, run: Run, log: BinaryIO) -> None:
        self._name = run.name
        self._received: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "polycom_ext.cli", "node", str(run.directory.path)],
            env={
                **os.environ,
                **secrets.values(run.command.environment),
                node.LOCKED_LOG: str(log.fileno()),
            },
            stdin=subprocess.DEVNULL,
            pass_fds=[log.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C comes from here, once
        )

    def status(self) -> int | None:
        status = self._process.poll()
        if status is None or status >= 0:
            return status
        if -status in self._received:  # before it could handle it
            return 128 - status
        print(
            f"{self._name}: its node (process {self._process.pid}) was killed by "
            f"{signal.Signals(-status).name}; the same command goes on from the last checkpoint, or says "
            "what still runs",
            file=sys.stderr,
        )
        return node.FAILED

    def signal(self, signum: int) -> None:
        self._received.append(signum)
        self._process.send_signal(signum)
