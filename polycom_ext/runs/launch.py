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

from polycom_ext.runs.entry import STOP

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to end; a second one of them kills it."""
SAVING = (signal.SIGTERM, signal.SIGUSR1)
"""Those with which job systems announce the end: a trainer that can saves a checkpoint first."""
POLL_SECONDS = 0.3
LOG_BYTES = 1 << 20
"""As much of the end of a log is looked at for what went wrong."""
Tick = Callable[[], None]
"""Called while a trainer runs, to show what is new."""
GRACE_SECONDS = 60.0
"""How long a trainer that saves nothing may take to end after a signal; the launcher itself gives its workers
30 seconds."""
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


class Ending:
    """What asks a trainer to end: the signals that reach this process, and the nodes beside it.

    SIGTERM and SIGUSR1 are told to the trainer's workers, by entry.STOP, if they catch that: they save and
    end, within `grace` seconds. Where none does, the process group of the launcher gets SIGTERM, as it gets
    SIGINT and SIGHUP. A second signal to this process kills it.
    """

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self._grace = grace
        self._own: list[int] = []
        self._passed_on: int | None = None
        self._at_once = False
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = b""

    @property
    def signal(self) -> int | None:
        """The first one."""
        return self._own[0] if self._passed_on is None and self._own else self._passed_on

    def hear(self, signum: int, frame: FrameType | None = None) -> None:
        """This process was told to end."""
        self._own.append(signum)
        if self.is_impatient:
            self.end_at_once()
        elif self._passed_on is None:
            self._send(signum)

    def pass_on(self, signum: int) -> None:
        """Another node was told to end."""
        if self.signal is None:
            self._passed_on = signum
            self._send(signum)

    def end_at_once(self) -> None:
        """There is nothing left that the trainer could do."""
        self._at_once = True
        self._send(signal.SIGKILL)

    @property
    def is_impatient(self) -> bool:
        """Whether this process was told twice."""
        return len(self._own) > 1

    def begin(self, process: subprocess.Popen[bytes], mark: bytes) -> None:
        """The trainer; what came before there was one is told to it now."""
        self._process, self._mark = process, mark
        if self._at_once:
            self._send(signal.SIGKILL)
        elif self.signal is not None:
            self._send(self.signal)

    def done(self) -> None:
        """There is no trainer any more."""
        self._process = None

    def stop(self) -> float:
        """Tell the workers of a signal of SAVING; how long the trainer may take to end."""
        if self.signal not in SAVING or self._process is None:
            return GRACE_SECONDS
        if _tell_workers(self._process.pid, self._mark):
            return self._grace
        _signal_group(self._process, signal.SIGTERM)  # as which torchrun knows a stop
        return GRACE_SECONDS

    def _send(self, signum: int) -> None:
        """At once, but for what `stop` tells: it looks at all processes, too much for a signal's handler."""
        if self._process is not None and signum not in SAVING:
            _signal_group(self._process, signum)


def launch(script: str, environment: Mapping[str, str], log: BinaryIO, tick: Tick, ending: Ending) -> Outcome:
    """Run a shell script, with these variables more, its output appended to the open log.

    `tick` is called a few times a second; `ending`, which the caller has made the handler of signals, may ask
    the script's process group to end at any time. When this returns or raises, no process of it is left.
    """
    marker = uuid.uuid4().hex
    mark = f"{MARKER}={marker}".encode()
    start = log.seek(0, os.SEEK_END)
    process: subprocess.Popen[bytes] | None = None
    try:
        with _as_file(script) as path:
            process = subprocess.Popen(
                ["/bin/sh", path],
                env={**os.environ, **environment, MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[int(Path(path).name)],
            )
        ending.begin(process, mark)
        _wait(process, tick, ending)
    finally:
        ending.done()
        if process is not None:
            _end(process)
        _kill_all(mark)
    tick()
    return Outcome(process.returncode, ending.signal, _read_from(Path(log.name), start))


@contextlib.contextmanager
def _as_file(script: str) -> Iterator[str]:
    """A file of memory that a child reads the script from: as long as it may be, and no file of the run's."""
    with open(os.memfd_create("command"), "wb") as file:
        file.write(script.encode("utf-8", "surrogateescape"))
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that the launcher is gone; it still runs only if something went wrong on this side."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    if process.poll() is None:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], tick: Tick, ending: Ending) -> None:
    deadline: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return
        tick()
        if ending.signal is not None and deadline is None:
            deadline = time.monotonic() + ending.stop()
        if deadline is not None and time.monotonic() > deadline:
            ending.end_at_once()


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


def _tell_workers(launcher: int, mark: bytes) -> bool:
    """Ask the workers of a launch to save and end; whether there is one that hears it.

    One is enough, as they agree among themselves. By default the signal would kill, and so it would one that
    has not come so far as to hear it.
    """
    told = False
    for pid, environment in _environments():
        if pid != launcher and _mark(environment) == mark and _leads_session(pid) and _catches(pid, STOP):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, STOP)
                told = True
    return told


def _catches(pid: int, signum: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    caught = status.partition("SigCgt:")[2].split()
    return bool(caught) and bool(int(caught[0], 16) >> (signum - 1) & 1)


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


def are_orphans(pids: list[int]) -> bool:
    """Whether these are processes of a trainer whose `polycom node` is gone."""
    environments = dict(_environments())
    return bool(pids) and all(_mark(environments.get(pid, b"")) is not None for pid in pids)


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
