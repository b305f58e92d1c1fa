"""The backend `local`: a run on this machine, as a child that goes on if this process is killed."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.files import writers
from polycom_ext.runs import launch, node, secrets
from polycom_ext.runs.backends import Submitted
from polycom_ext.runs.backends.rendering import NODE_SCRIPT, node_command, node_script
from polycom_ext.runs.plan import Run


class Local:
    """Starts the one node of a run; of a run on several nodes it says how to start them."""

    def files(self, run: Run) -> dict[str, str]:
        if run.site.container is not None:
            raise PolycomError(
                f"{run.name}: local starts no container, and the site asks for one: `--backend docker`"
            )
        return {NODE_SCRIPT: node_script(run, node_command(run))} if run.site.setup else {}

    def check(self, run: Run) -> None: ...

    def submit(self, run: Run, log: BinaryIO) -> Submitted:
        run.directory.write_job({"backend": "local", "host": platform.node()})
        if run.spec.nodes > 1:
            print(
                f"{run.name}: planned for {run.spec.nodes} nodes, and this machine is one; give on each, "
                f"with R from 0 to {run.spec.nodes - 1} and a free port of node 0:\n"
                f"    polycom node {run.directory.path} --node-rank R --rendezvous HOST:PORT"
            )
            return _Told()
        sys.stdout.flush()
        return _Child(run, log)

    def standing(self, job: Mapping[str, Any]) -> None:
        """Nobody queues it."""

    def stop(self, run: Run) -> None:
        """Ask what works in the directory on this machine to end."""
        logs = [log for rank in range(run.spec.nodes) if (log := run.directory.log_of(rank)).is_file()]
        nodes = launch.outermost(sorted({pid for log in logs for pid in writers(log)}))
        if not nodes:
            started = [one for one in run.directory.attempts()[-1:] if "ended" not in one]
            elsewhere = [one["host"] for one in started if one["host"] != platform.node()]
            where = (
                f"it was started on {elsewhere[0]}, where to give this" if elsewhere else "nothing to stop"
            )
            raise PolycomError(f"{run.name} does not run on this machine: {where}")
        for pid in nodes:
            os.kill(pid, signal.SIGTERM)
            print(f"{run.name}: asked process {pid} to end; give this once more to kill it")


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
            ["bash", run.directory.path / NODE_SCRIPT] if run.site.setup else node_command(run),
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
