"""Start ranks of the training entry by forking a process that has imported it: saves seconds a run.

Reads one JSON object a line, {"arguments": […], "processes": N, "log": FILE, "kill_at": STEP, "timeout":
SECONDS}, runs the entry's `main()` in N forked ranks with the environment that torchrun would give them, and
answers with the exit statuses.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

from polycom_ext import rehearsal
from polycom_ext.integrations.olmo import train


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(request: dict, rank: int, port: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["processes"]),
        LOCAL_WORLD_SIZE=str(request["processes"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if request["kill_at"]:
        _kill_at(request["kill_at"])
    status = 1
    try:
        status = train.main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _kill_at(step: int) -> None:
    """kill -9 of this rank as soon as it has trained `step` steps."""
    train_step = recording.RecordingTrainer.train_step

    def train_and_die(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = train_step(self, *args, **kwargs)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    recording.RecordingTrainer.train_step = train_and_die


def _run(request: dict) -> list[int]:
    port = _free_port()
    children = []
    for rank in range(request["processes"]):
        child = os.fork()
        if child == 0:
            _rank(request, rank, port)
        children.append(child)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout"]
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        failed = any(status != 0 for status in statuses.values())
        if failed or time.monotonic() > deadline:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    rehearsal.enable("olmo")
    rehearsal.enable = lambda upstream: None  # done, for every rank that is forked from here
    recording = importlib.import_module("polycom_ext.integrations.olmo.recording")
    importlib.import_module("polycom_ext.integrations.olmo.loop")
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)
