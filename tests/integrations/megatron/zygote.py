"""Start ranks of the real training entry by forking a process that has imported it: saves seconds a run.

Reads one JSON object a line, {"arguments": […], "processes": N, "log": FILE, "kill_when": TEXT, "timeout":
SECONDS}, runs the entry's `main()` in N forked ranks with the environment that torchrun would give them, and
answers with the exit statuses.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from polycom_ext import rehearsal
from polycom_ext.integrations.megatron import pretrain


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(request: dict, rank: int, port: int) -> None:
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
    sys.argv = ["pretrain", *request["arguments"]]
    status = 1
    try:
        pretrain.main()
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(request: dict) -> list[int]:
    port = _free_port()
    children = []
    for rank in range(request["processes"]):
        child = os.fork()
        if child == 0:
            _rank(request, rank, port)
        children.append(child)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + request.get("timeout", 240)
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        text = request.get("kill_when")
        killed = bool(text) and os.path.exists(request["log"]) and text in Path(request["log"]).read_text()
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


if __name__ == "__main__":
    rehearsal.enable("megatron")
    rehearsal.enable = lambda upstream: None  # done, for every rank that is forked from here
    importlib.import_module("polycom_ext.integrations.megatron.gpt")
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)
