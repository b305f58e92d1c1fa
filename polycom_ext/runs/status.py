"""How a run stands, told from its record: while it runs too, by any process, without taking its lock.

What only the trainer's adapter knows (the last step, the tokens of one, the checkpoint to go on from) is told
where that adapter is installed.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from polycom_ext.errors import PolycomError
from polycom_ext.files import writers
from polycom_ext.runs import backends, efficiency, launch, progress
from polycom_ext.runs import record as names
from polycom_ext.runs.record import Metrics, Record, Series, read_metrics

PLANNED, QUEUED, RUNNING, SILENT, DIED = "planned", "queued", "running", "silent", "died"
FINISHED, INTERRUPTED, REFUSED, FAILED, ENDED = "finished", "interrupted", "refused", "failed", "ended"
UNREADABLE = "unreadable"
"""States. Planned: never begun. Queued: a job system has it, to start or to start again. Silent: out of
sight, and nothing written for a while. Died: gone without a word of its end. Interrupted: told to stop.
Refused: its trainer would not run. Ended: well, but before its last step. Unreadable: its record is."""
GOING_ON = (PLANNED, QUEUED, RUNNING, SILENT)
"""States in which a run has not ended."""
BETWEEN = (PLANNED, DIED, INTERRUPTED, FAILED, ENDED)
"""States in which a job system may be about to start it, which alone knows that."""

OUT_OF_SIGHT = (RUNNING, SILENT)
"""States in which it may have ended without a word."""

ASK_SECONDS = 60.0
"""A run that writes as often needs no job system to be asked for it."""
FRESH_SECONDS = 600.0
"""A run on another machine is at work if it has written something since; longer where its steps are."""
RECENT = 20
"""So many logged steps say how fast it is."""


@dataclass(frozen=True)
class Status:
    """One run. None is what is not known, or is not there."""

    run: str
    path: str
    state: str
    reason: str | None
    """What else there is to say of the state: why it was refused, how it failed, where it runs."""
    since: str | None
    """When it got into this state, ISO 8601."""
    attempts: int
    step: int | None = None
    total_steps: int | None = None
    tokens: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """0 to 1"""
    mfu_of: str | None = None
    """What that is a share of, or why there is none."""
    peak_memory_bytes: float | None = None
    """Of the device that has held the most; of a process where there is no GPU."""
    loss: float | None = None
    validation_loss: float | None = None
    seconds_left: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    untold: str | None = None
    """Why its trainer's adapter tells nothing of it."""

    @property
    def is_going_on(self) -> bool:
        """Whether the end of it is still to come."""
        return self.state in GOING_ON


def read(path: Path) -> Status:
    """How the run in a directory stands. Raises PolycomError for a directory that is no run's."""
    record = Record(path)
    try:
        spec, attempts = record.read_spec(), record.attempts()
        logged = read_metrics(record.metrics)
        seconds = _recent(logged, names.STEP_SECONDS)
        reckoned = efficiency.read(record)
        state, reason, since = _state(record, attempts, seconds)
        if state == DIED and record.attempts() != attempts:  # it has just noted its end, and gone
            state, reason, since = _state(record, record.attempts(), seconds)
    except PolycomError as error:
        if not record.spec.is_file():
            raise
        return Status(path.name, str(path), UNREADABLE, str(error), None, 0)
    if (waits := _waiting(record, state)) is not None:
        before = ": ".join(filter(None, (state, reason))) if attempts else None
        state, reason = QUEUED, "; before that ".join(filter(None, (waits, before)))
    step = _step(record, attempts, logged)
    told = _Told(record, spec)
    total, each = told.total_steps, told.tokens_of_a_step
    checkpoint, age = told.checkpoint()
    return Status(
        run=str(spec.get("name") or path.name),
        path=str(path),
        state=state,
        reason=reason,
        since=None if since is None else _iso(since),
        attempts=len(attempts),
        step=step,
        total_steps=total,
        tokens=None if step is None or each is None else step * each,
        step_seconds=seconds,
        tokens_per_second=_recent(logged, names.TOKENS_PER_SECOND)
        or (each / seconds if each and seconds else None),
        mfu=_recent(logged, names.MFU) if reckoned and reckoned.peak_flops else None,
        mfu_of=None if reckoned is None else reckoned.explained(),
        peak_memory_bytes=_last(logged, names.PEAK_MEMORY),
        loss=_at(logged.series.get(names.TRAIN_LOSS, {}), step),
        validation_loss=_at(names.validation(logged.series), step),
        seconds_left=_left(step, total, seconds) if state == RUNNING else None,
        checkpoint_step=checkpoint,
        checkpoint_age_seconds=age,
        untold=told.problem,
    )


def _state(
    record: Record, attempts: list[dict[str, Any]], step_seconds: float | None
) -> tuple[str, str | None, float | None]:
    """(state, reason, since when in seconds since the epoch)"""
    last = attempts[-1] if attempts else {}
    refusal, ended = record.read_refusal(), _time(last.get("ended"))
    if refusal is not None:  # the last attempt's, or of one that was not even begun
        return REFUSED, refusal, _modified(record.refusal)
    if last.get("complete"):
        return FINISHED, None, ended
    if not attempts:
        return PLANNED, None, _modified(record.spec)
    status, signum = last.get("status"), last.get("signal")
    if status is None:
        return _without_end(record, last, step_seconds)
    if signum is not None:
        return INTERRUPTED, f"by {_signal_name(signum)}", ended
    if last.get("cause") is not None:
        return FAILED, str(last["cause"]), ended
    if status == 0:
        return ENDED, "before its last step", ended
    return FAILED, f"killed by {_signal_name(-status)}" if status < 0 else f"exit status {status}", ended


def _waiting(record: Record, state: str) -> str | None:
    """What the job system that has the run says of it, a clause; None where no start of it is to come."""
    if state not in (*BETWEEN, *OUT_OF_SIGHT) or not record.job.is_file():
        return None
    job = record.read_job() or {}
    quiet = time.time() - max(filter(None, map(_modified, (record.log, record.metrics))), default=0.0)
    if state == RUNNING and quiet < ASK_SECONDS:
        return None
    try:
        standing = backends.find(str(job.get("backend"))).standing(job)
    except Exception:  # of a backend that is not installed here, or of what another version has noted
        return None
    if standing is None or (state in OUT_OF_SIGHT and standing.is_at_work):
        return None
    return standing.said


def _without_end(
    record: Record, attempt: dict[str, Any], step_seconds: float | None
) -> tuple[str, str | None, float | None]:
    """It goes on while its processes have the log open; where these are out of sight, while it writes."""
    started, host, pid = _time(attempt.get("started")), attempt.get("host"), attempt.get("pid")
    written = max(filter(None, map(_modified, (record.log, record.metrics))), default=started or 0.0)
    where = f"on {host}"
    if host == platform.node():
        pids = writers(record.log) if record.log.exists() else []
        if pid in pids:
            return RUNNING, None, started
        if launch.left_over(pids) is None:
            return RUNNING, f"process {pid}, which watched it, is gone; its trainer goes on", started
        if not record.log.exists() or os.geteuid() in (0, record.log.stat().st_uid):
            return DIED, f"process {pid} is gone and has noted no end", written
        where = "of another user"
    quiet = max(0.0, time.time() - written)
    reason = f"{where}; it wrote last {progress.duration(quiet)} ago"
    if quiet < max(FRESH_SECONDS, 3 * (step_seconds or 0)):
        return RUNNING, reason, started
    return SILENT, reason, written


class _Told:
    """What the trainer's adapter tells of a run; nothing where there is none."""

    def __init__(self, record: Record, mapping: dict[str, Any]) -> None:
        self.problem: str | None = None
        self.total_steps: int | None = None
        self.tokens_of_a_step: int | None = None
        self._record = record
        self._latest: int | None = None
        try:
            from polycom_ext.runs import adapter, spec

            resolved = spec.from_mapping(mapping, str(record.spec))
            told = adapter.find(resolved.trainer)
            self.total_steps = told.total_steps(resolved)
            self.tokens_of_a_step = told.facts(resolved).tokens(1)
            self._latest = told.latest_step(resolved, record.path)
        except Exception as error:  # a missing trainer, or a checkpoint that is just being written
            self.problem = str(error) or type(error).__name__

    def checkpoint(self) -> tuple[int | None, float | None]:
        """(step, age in seconds) of the checkpoint from which the run would go on."""
        if self._latest is None:
            return None, None
        paths = list(self._record.checkpoints.glob("*"))
        of_step = [path for path in paths if re.fullmatch(rf"\D*0*{self._latest}(\D.*)?", path.name)]
        times = filter(None, map(_modified, of_step or paths))
        newest = max(times, default=None)
        return self._latest, None if newest is None else max(0.0, time.time() - newest)


def _step(record: Record, attempts: list[dict[str, Any]], logged: Metrics) -> int | None:
    """The last one logged in this attempt, else the one that it went on from."""
    started = _time(attempts[-1].get("started")) if attempts else None
    written = _modified(record.metrics)
    if started is not None and (logged.step is None or (written or 0) < started):
        return attempts[-1].get("from_step") or 0
    return logged.step


def _recent(logged: Metrics, name: str) -> float | None:
    values = list(logged.series.get(name, {}).values())[-RECENT:]
    middle = median(values) if values else math.nan
    return middle if 0 < middle < math.inf else None


def _last(logged: Metrics, name: str) -> float | None:
    return next(reversed(logged.series.get(name, {}).values()), None)


def _left(step: int | None, total: int | None, step_seconds: float | None) -> float | None:
    if step is None or total is None or step_seconds is None:
        return None
    return step_seconds * max(0, total - step)


def _at(series: Series, step: int | None) -> float | None:
    """The last value up to a step: a resumed run has those of later steps from before."""
    return next((series[at] for at in reversed(series) if step is not None and at <= step), None)


def _modified(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return None


def _time(text: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
