"""The backend `local`: a run on this machine, as a child that goes on if this process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import BinaryIO

from polycom_ext.runs import node, secrets
from polycom_ext.runs.launch import SIGNALS, handled
from polycom_ext.runs.plan import Run


class Local:
    """Starts the one node of a run and waits for it; of a run on several nodes it says how to start them."""

    def submit(self, run: Run, log: BinaryIO) -> int:
        if run.spec.nodes > 1:
            print(
                f"{run.name}: planned for {run.spec.nodes} nodes, and this machine is one; give on each, "
                f"with R from 0 to {run.spec.nodes - 1} and a free port of node 0:\n"
                f"    polycom node {run.directory.path} --node-rank R --rendezvous HOST:PORT"
            )
            return 0
        process: subprocess.Popen[bytes] | None = None
        received: list[int] = []

        def forward(signum: int, frame: FrameType | None) -> None:
            received.append(signum)
            if process is not None:
                process.send_signal(signum)

        sys.stdout.flush()
        with handled(forward):
            # What comes before the child can hear it is delivered once it can, here and there.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process = subprocess.Popen(
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
                for signum in received:
                    process.send_signal(signum)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            status = process.wait()
        if status >= 0:
            return status
        if -status in received:  # before it could handle it
            return 128 - status
        print(
            f"{run.name}: its node (process {process.pid}) was killed by {signal.Signals(-status).name}; "
            "the same command goes on from the last checkpoint, or says what still runs",
            file=sys.stderr,
        )
        return node.FAILED
