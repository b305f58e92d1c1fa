"""What a node shows and notes of an attempt: its steps, how it ended and why."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time

from polycom_ext.errors import PolycomError
from polycom_ext.runs import launch, lobby, progress, record
from polycom_ext.runs.entry import DISK_FULL
from polycom_ext.runs.lobby import FAILED, REFUSED, Verdict
from polycom_ext.runs.plan import Run

TAIL_LINES = 20
"""How much of the log is shown when a trainer fails."""
PATIENCE_SECONDS = 60.0
"""A run without a step after so long says what its trainer said last, and again after twice as long."""
FULL_BYTES = 1 << 20
"""A disk with less room than this counts as full."""


class Follower:
    """Prints what the trainer has logged since the last call; before the first record, what is waited for."""

    def __init__(self, run: Run) -> None:
        self.began = time.monotonic()
        self.records = 0
        self._name = run.name
        self._log, self._log_start = run.directory.log, run.directory.log.stat().st_size
        self._tail = progress.MetricsTail(run.directory.metrics)
        self._total = run.adapter.total_steps(run.spec)
        self._patience = PATIENCE_SECONDS

    def __call__(self) -> None:
        with contextlib.suppress(OSError):  # what is only shown ends no run
            for step, metrics in self._tail.records():
                self.records += 1
                line = progress.format_line(step, metrics, self._total)
                if line is not None:
                    print(f"{self._name}: {line}", flush=True)
            waited = time.monotonic() - self.began
            if not self.records and waited > self._patience:
                self._patience *= 2
                said = progress.last_line(self._log, self._log_start) or "nothing"
                waited_for = progress.duration(waited)
                print(f"{self._name}: no step after {waited_for}; the log ends with: {said}", flush=True)


def note_end(run: Run, outcome: launch.Outcome, verdict: Verdict | None) -> None:
    """Note how the attempt ended; a full disk must not hide how that was."""
    status, cause = outcome.status, None
    if verdict is not None:
        status, cause = verdict.ended, verdict.sentence if verdict.status == FAILED else None
    try:
        if verdict is not None and verdict.status == REFUSED:
            record.refuse(run.directory.path, verdict.sentence)  # which may not be seen here yet
        complete = status == 0 and run.is_complete()
        run.directory.end_attempt(status, signal=outcome.interrupted, complete=complete, cause=cause)
    except (OSError, PolycomError) as error:
        print(f"{run.name}: the end of this attempt could not be noted: {error}", file=sys.stderr)


def note_lost_host(run: Run, attempt: int, verdict: Verdict) -> None:
    """Note the end of an attempt whose first node is gone, unless somebody has."""
    with contextlib.suppress(OSError, PolycomError):
        attempts = run.directory.attempts()
        if len(attempts) == attempt and "ended" not in attempts[-1]:
            run.directory.end_attempt(FAILED, cause=verdict.sentence)


def did_nothing(run: Run, follower: Follower, from_step: int | None) -> bool:
    """Whether a run of known length neither logged nor saved a step: upstream may give up with status 0."""
    known = run.adapter.total_steps(run.spec) is not None
    return known and not follower.records and run.latest_step() == from_step


def write_coefficients(run: Run) -> None:
    """Write what a complete run has learned; it is complete whether they can be read or not."""
    try:
        learned = run.adapter.coefficients(run.spec, run.directory.path)
        if learned is not None:  # else the trainer has written them
            run.directory.write_coefficients(learned)
    except Exception as error:  # whatever reading a checkpoint raises: the training is done and saved
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{run.name}: complete, but without coefficients.json: {reason}", file=sys.stderr)


def explain_failure(run: Run, rank: int, outcome: launch.Outcome) -> None:
    show_end_of_log(run, rank, outcome, f"the trainer {lobby.how(outcome.status)}")
    path = run.directory.path
    if shutil.disk_usage(path).free < FULL_BYTES:
        print(f"{run.name}: the disk of {path} is full", file=sys.stderr)


def why_refused(run: Run, outcome: launch.Outcome) -> str | None:
    """One sentence for what a person must change first, which is noted; None if there is nothing."""
    refusal = run.directory.read_refusal()
    if refusal is not None or outcome.status != DISK_FULL:
        return refusal
    try:
        step = run.latest_step()
        goes_on = "starts anew" if step is None else f"goes on from the checkpoint of step {step}"
    except PolycomError as error:
        goes_on = f"says: {error}"
    full = f"the disk of {run.directory.path} is full; make room there, and the same command {goes_on}"
    with contextlib.suppress(OSError):
        record.refuse(run.directory.path, full)
    return full


def show_end_of_log(run: Run, rank: int, outcome: launch.Outcome, what: str) -> None:
    log = run.directory.log_of(rank)
    head = f"{run.name}: {what}; the last lines of {log}:"
    lines = [head, *(f"    {line}" for line in outcome.last_lines(TAIL_LINES))]
    print("\n".join(lines), file=sys.stderr)  # at once: other runs may write there too


def since(began: float) -> str:
    return progress.duration(time.monotonic() - began)
