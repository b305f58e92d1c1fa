"""Run one command on this machine, with nothing left behind however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a run to end; a second one of them kills it."""
POLL_SECONDS = 0.3
LOG_BYTES = 1 << 20
"""As much of the end of a log is looked at for what went wrong."""
Tick = Callable[[], None]
"""Called while a trainer runs, to show what is new."""
GRACE_SECONDS = 60.0
"""How long a trainer may take to end after a signal; the launcher itself gives its workers 30 seconds."""
LAUNCHERS_OWN = "torch/distributed/elastic/"
"""Stands in each line that tells of a failed worker."""
MARKER = "POLYCOM_LAUNCH"
"""Environment variable by which every process of a launch is recognised, whatever group it has moved to."""


@dataclass(frozen=True)
class Outcome:
    """How a trainer ended."""

    status: int
    """Exit status of the worker that failed first, negative for a signal; 0 if all went well."""
    interrupted: int | None
    """The signal that was forwarded to the trainer, if one was."""
    log: str
    """What the trainer wrote in this attempt, or the end of it."""

    def last_lines(self, count: int) -> list[str]:
        """The end of the trainer's own output, without the launcher's report on its workers."""
        lines = self.log.splitlines()
        report = next((n for n, line in enumerate(lines) if LAUNCHERS_OWN in line), None)
        return lines[: report or len(lines)][-count:]


def launch(script: Path, environment: Mapping[str, str], log: BinaryIO, tick: Tick) -> Outcome:
    """Run a shell script, with these variables more, its output appended to the open log.

    `tick` is called a few times a second.

    SIGINT, SIGTERM and SIGHUP are forwarded to the command's process group, a second one kills it. When this
    returns or raises, no process of the command is left.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if process is not None:
            _signal_group(process, signum if len(received) == 1 else signal.SIGKILL)

    marker = uuid.uuid4().hex
    start = log.seek(0, os.SEEK_END)
    with handled(forward):
        try:
            process = subprocess.Popen(
                ["/bin/sh", str(script)],
                env={**os.environ, **environment, MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if received:  # came before there was a process to forward it to
                _signal_group(process, received[0])
            _wait(process, tick, received)
        finally:
            if process is not None:
                _end(process)
            _kill_all(f"{MARKER}={marker}".encode())
    tick()
    text = _read_from(Path(log.name), start)
    return Outcome(process.returncode, received[0] if received else None, text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that the launcher is gone; it still runs only if something went wrong on this side."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    if process.poll() is None:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], tick: Tick, received: list[int]) -> None:
    deadline: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return
        tick()
        if received and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            _signal_group(process, signal.SIGKILL)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that end a run, but for those that the caller's shell ignores (nohup).

    Those that the parent has held back until this process can hear them come first.
    """
    previous = {n: signal.signal(n, handler) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold these signals back, here and in what is started meanwhile, until each of them can hear them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def end_leftovers(pids: list[int]) -> bool:
    """End these processes, and all of their launches, if they are left over; whether they were."""
    launches = left_over(pids)
    for mark in launches or ():
        _kill_all(mark)
    return bool(pids) and launches is not None


def left_over(pids: list[int]) -> set[bytes] | None:
    """The launches of these processes, by their marks, if nobody works in those any more; else None.

    A launch works for as long as torchrun or one of its workers lives: each leads a session, which what it
    starts shares. Writers of checkpoints whose worker was killed wait for it for ever. A process of no launch
    works, too. Processes that are ending by themselves do not count.
    """
    environments = dict(_environments())
    marks = {pid: _mark(environment) for pid, environment in environments.items()}
    launches = {marks.get(pid) for pid in pids if not _is_ending(pid, environments)}
    if any(mark in launches and _leads_session(pid) for pid, mark in marks.items()):
        return None
    dead = {mark for mark in launches if mark is not None}
    return dead if len(dead) == len(launches) else None


def _is_ending(pid: int, environments: dict[int, bytes]) -> bool:
    """Whether a process is gone or has given its memory back, and its locks a moment later."""
    return environments.get(pid) == b"" or not Path(f"/proc/{pid}").exists()


def users(pids: list[int]) -> str:
    """Who has a directory in use, and what can be done about it, as the end of a sentence."""
    if not pids:
        return "another run, perhaps on another machine; wait for its end or give another --output"
    environments = dict(_environments())
    first = outermost(pids)
    alone = all(_mark(environments.get(pid, b"")) is not None for pid in pids)
    who = "a trainer that outlived its `polycom node`" if alone else "another run"
    named = " ".join(map(str, first))
    return (
        f"{who} (process {named.replace(' ', ', ')}); wait for its end, end it with `kill {named}`, "
        "or give another --output"
    )


def outermost(pids: list[int]) -> list[int]:
    """Those of the processes that none of the others has started."""
    return [pid for pid in pids if _parent(pid) not in pids]


def _mark(environment: bytes) -> bytes | None:
    """`POLYCOM_LAUNCH=…` among a process's variables."""
    words = (word for word in environment.split(b"\0") if word.startswith(f"{MARKER}=".encode()))
    return next(words, None)


def _leads_session(pid: int) -> bool:
    state, session = _stat(pid, 0), _stat(pid, 3)
    return state != "Z" and session == str(pid)


def _parent(pid: int) -> int:
    return int(_stat(pid, 1) or 0)


def _stat(pid: int, field: int) -> str | None:
    """A field of /proc/PID/stat behind the name: 0 the state, 1 the parent, 3 the session."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[field]
    except OSError:
        return None


def _kill_all(mark: bytes) -> None:
    """Kill what still carries the mark: workers lead sessions of their own and outlive a killed launcher."""
    while True:
        marked = [pid for pid, environment in _environments() if _mark(environment) == mark]
        if not marked:
            return
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _environments() -> Iterator[tuple[int, bytes]]:
    """Of every process that may be looked at; empty for one that has given its memory back."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        try:
            yield pid, path.read_bytes()
        except ProcessLookupError:  # as newer kernels say it
            yield pid, b""
        except OSError:
            continue


def _read_from(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - LOG_BYTES))
        return file.read().decode("utf-8", errors="replace")
