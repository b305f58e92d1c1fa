"""Hand planned runs to a backend, one or several at once, and wait for them."""

from __future__ import annotations

import time
from types import FrameType

from polycom_ext.runs import absent, launch
from polycom_ext.runs.backends import Backend, Submitted
from polycom_ext.runs.plan import Run

POLL_SECONDS = 0.1


def submit(runs: list[Run], backend: Backend, jobs: int) -> int:
    """Have the runs executed in their order, up to `jobs` at once; the highest of their exit statuses.

    Once one has not ended well no other starts, but those that are under way go on to their end. The signals
    that end a run reach all of them.

    Raises:
        PolycomError: a run could not be started; raised once those under way have ended.
    """
    running: list[Submitted] = []
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for submitted in list(running):
            submitted.signal(signum)

    waiting = list(runs)
    statuses = [0]
    with launch.handled(forward):
        try:
            while waiting and not received and not any(statuses):
                _start(waiting.pop(0), backend, running)
                statuses += _ended(running, leave=jobs - 1)
        finally:
            statuses += _ended(running, leave=0)
    if waiting and received:
        statuses.append(128 + received[0])
    return max(statuses)


def _start(run: Run, backend: Backend, running: list[Submitted]) -> None:
    if run.says_finished():
        return
    with run.directory.locked() as log:
        backend.check(run)
        run.directory.write(run.spec, run.adapter, run.command, run.site, backend.files(run))
        absent.clear(run.directory)
        with launch.held_back():
            running.append(backend.submit(run, log))


def _ended(running: list[Submitted], leave: int) -> list[int]:
    """The exit statuses of those that have ended, once no more than `leave` of them run."""
    statuses = []
    while True:
        for submitted in list(running):
            status = submitted.status()
            if status is not None:
                running.remove(submitted)
                statuses.append(status)
        if len(running) <= leave:
            return statuses
        time.sleep(POLL_SECONDS)
