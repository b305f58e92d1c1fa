"""Ranks of a training entry, forked from a process that has imported it: saves seconds a run.

A zygote imports an entry and calls `serve`, which reads one JSON object a line, {"arguments": […],
"processes": N, "log": FILE, "timeout": SECONDS, "kill_when": TEXT, "stop_when": TEXT}, runs the entry in N
forked ranks with the environment that torchrun would give them, and answers with the exit statuses. All ranks
are killed once one has failed or the log holds the text of "kill_when"; the last one is asked to stop once it
holds that of "stop_when".
"""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = Callable[[dict[str, Any]], int | None]
"""Takes the request; returns the exit status, or raises."""


class Zygote:
    """The other end: starts a zygote's script with `paths` to import from, and sends it requests."""

    def __init__(self, script: Path, paths: list[Path], environment: dict[str, str], **options: Any) -> None:
        # This folder has no other file: one beside it would be found under its name, as transformer_engine.
        python_path = os.pathsep.join(map(str, [*paths, Path(__file__).parent]))
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "PYTHONPATH": python_path},
            **options,
        )

    def run(self, request: dict[str, Any]) -> list[int]:
        """The exit status of each rank; they are in the folder that this process is in now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "folder": os.getcwd()}) + "\n")
        self._process.stdin.flush()
        statuses: list[int] = json.loads(self._process.stdout.readline())
        return statuses

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(entry: Entry) -> None:
    """Answer requests until there are no more."""
    gc.freeze()  # ranks collect garbage often, and need not look through all that was imported
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), entry)), flush=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(request: dict[str, Any], rank: int, port: int, entry: Entry) -> None:
    os.chdir(request["folder"])
    os.setsid()  # so that what this rank starts (the manager of a checkpoint's writers) can be ended with it
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
    status = 1
    try:
        status = entry(request) or 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _says(request: dict[str, Any], key: str) -> bool:
    text, log = str(request.get(key) or ""), Path(request["log"])
    return bool(text) and log.exists() and text in log.read_text()


def _run(request: dict[str, Any], entry: Entry) -> list[int]:
    port = _free_port()
    children = []
    for rank in range(request["processes"]):
        child = os.fork()
        if child == 0:
            _rank(request, rank, port, entry)
        children.append(child)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout"]
    stopped = False
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        killed = _says(request, "kill_when")
        if not stopped and _says(request, "stop_when"):
            os.kill(children[-1], signal.SIGUSR1)
            stopped = True
        failed = any(status != 0 for status in statuses.values())
        if killed or failed or time.monotonic() > deadline:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return [statuses[child] for child in children]
