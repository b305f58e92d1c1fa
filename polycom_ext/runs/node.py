"""`polycom node RUN_DIR`: execute a planned run, or go on with it, on this node.

The same command on every node and under every backend; it reads the run's record, and secrets from its own
environment. The first node holds the directory, shows the metrics and notes attempts and their ends; the
exit status is the same on all. A backend may start it again on 128 + SIGNAL, and on 1 at its discretion.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from polycom_ext.errors import PolycomError
from polycom_ext.runs import launch, plan, progress, secrets
from polycom_ext.runs.entry import RUN_DIR
from polycom_ext.runs.plan import Run
from polycom_ext.runs.rendering import NODE_RANK, RENDEZVOUS

DONE, FAILED, REFUSED = 0, 1, 2
"""Exit statuses: complete; the trainer failed; a person must change something first, as one sentence says.
128 + SIGNAL: stopped by that signal, to be gone on with from the last checkpoint."""

LOCKED_LOG = "POLYCOM_LOCKED_LOG"
"""Environment variable of a node whose parent has planned the run and waits for it: the log's descriptor."""
TAIL_LINES = 20
"""How much of the log is shown when a trainer fails."""
PATIENCE_SECONDS = 60.0
"""A run without a step after so long says what its trainer said last, and again after twice as long."""
FULL_BYTES = 1 << 20
"""A disk with less room than this counts as full."""


@dataclass(frozen=True)
class Place:
    """Which node of its run this is."""

    rank: int
    rendezvous: str | None
    """HOST:PORT of the first node; None for a run on one."""

    @property
    def environment(self) -> dict[str, str]:
        """For the command; see rendering."""
        return {} if self.rendezvous is None else {NODE_RANK: str(self.rank), RENDEZVOUS: self.rendezvous}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Execute a planned run on this node, or go on with it. Exit status: 0 done, 1 failed, 2 refused (one "
        "sentence says why), 128 + SIGNAL stopped by it."
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="directory that `polycom run` has written"
    )
    parser.add_argument(
        "--node-rank",
        metavar="N",
        default=os.environ.get(NODE_RANK, "0"),
        help=f"which of the spec's `nodes` this is, the first one 0 (default: ${NODE_RANK}, else 0)",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        default=os.environ.get(RENDEZVOUS),
        help=f"where node 0 hears the others; several nodes need it (default: ${RENDEZVOUS})",
    )


def main(args: argparse.Namespace) -> int:
    """Run the trainer to its end and note how it ended."""
    inherited = os.environ.pop(LOCKED_LOG, None)
    if inherited is not None:
        args.verb = "run"  # which the user has typed
    run = plan.recorded(args.run_dir)
    place = _place(run, args.node_rank, args.rendezvous)
    run.directory.check_place()
    secrets.check(run.spec.environment)
    if place.rank == 0 and inherited is None and run.says_finished():
        return DONE
    with run.directory.locked(place.rank, None if inherited is None else int(inherited)) as log:
        return _first(run, place, log) if place.rank == 0 else _another(run, place, log)


def _place(run: Run, rank: str, rendezvous: str | None) -> Place:
    nodes = run.spec.nodes
    if nodes == 1:
        return Place(0, None)
    if not (rank.isascii() and rank.isdigit() and int(rank) < nodes):
        raise PolycomError(
            f"{run.name}: node rank {rank!r} is none of 0 to {nodes - 1}, as it has {nodes} nodes"
        )
    if not rendezvous:
        raise PolycomError(
            f"{run.name}: its {nodes} nodes need --rendezvous HOST:PORT, a free port of node 0"
        )
    return Place(int(rank), rendezvous)


def _first(run: Run, place: Place, log: BinaryIO) -> int:
    step = run.latest_step()
    run.directory.clear_metrics(run.spec, run.adapter)
    run.directory.begin_attempt(log, step)
    how = "starting" if step is None else f"resuming from step {step}"
    print(f"{run.name}: {how}; everything it says goes to {run.directory.log}", flush=True)
    follower = _Follower(run)
    outcome = _launch(run, place, log, follower)
    _note_end(run, outcome)
    complete = run.is_complete()
    status = _judge(run, place, outcome, complete, follower.began)
    if status != DONE:
        return status
    if not complete and _did_nothing(run, follower, step):
        _show_end_of_log(run, place, outcome, "the trainer ended without a step and without an error")
        return FAILED
    if complete and run.spec.entry.learnable:
        _write_coefficients(run)
    how = "finished in" if complete else "ended before its last step, after"
    print(f"{run.name}: {how} {_since(follower.began)} ({run.directory.path})", flush=True)
    return DONE


def _another(run: Run, place: Place, log: BinaryIO) -> int:
    """A node of which nothing is noted but what its workers refuse."""
    began = time.monotonic()
    said = f"everything it says goes to {run.directory.log_of(place.rank)}"
    print(f"{run.name}: node {place.rank} calls {place.rendezvous}; {said}", flush=True)
    outcome = _launch(run, place, log, lambda: None)
    return _judge(run, place, outcome, outcome.status == 0, began)


def _launch(run: Run, place: Place, log: BinaryIO, tick: launch.Tick) -> launch.Outcome:
    environment = {RUN_DIR: str(run.directory.path), **place.environment}
    return launch.launch(run.directory.command, environment, log, tick)


def _judge(run: Run, place: Place, outcome: launch.Outcome, complete: bool, began: float) -> int:
    """The exit status that an outcome asks for, explained; raises PolycomError for a refusal."""
    if outcome.interrupted is not None and not complete:
        print(
            f"{run.name}: stopped after {_since(began)}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 128 + outcome.interrupted
    if outcome.status == 0:
        return DONE
    refusal = run.directory.read_refusal()
    if refusal is not None:
        raise PolycomError(f"{run.name}: {refusal}")
    _explain_failure(run, place, outcome)
    return FAILED


class _Follower:
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


def _note_end(run: Run, outcome: launch.Outcome) -> None:
    """Note how the attempt ended; a full disk must not hide how that was."""
    try:
        complete = outcome.status == 0 and run.is_complete()
        run.directory.end_attempt(outcome.status, signal=outcome.interrupted, complete=complete)
    except (OSError, PolycomError) as error:
        print(f"{run.name}: the end of this attempt could not be noted: {error}", file=sys.stderr)


def _did_nothing(run: Run, follower: _Follower, from_step: int | None) -> bool:
    """Whether a run of known length neither logged nor saved a step: upstream may give up with status 0."""
    known = run.adapter.total_steps(run.spec) is not None
    return known and not follower.records and run.latest_step() == from_step


def _write_coefficients(run: Run) -> None:
    """Write what a complete run has learned; it is complete whether they can be read or not."""
    try:
        learned = run.adapter.coefficients(run.spec, run.directory.path)
        if learned is not None:  # else the trainer has written them
            run.directory.write_coefficients(learned)
    except Exception as error:  # whatever reading a checkpoint raises: the training is done and saved
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{run.name}: complete, but without coefficients.json: {reason}", file=sys.stderr)


def _explain_failure(run: Run, place: Place, outcome: launch.Outcome) -> None:
    if outcome.status < 0:
        how = f"was killed by {signal.Signals(-outcome.status).name}"
    else:
        how = f"failed with exit status {outcome.status}"
    _show_end_of_log(run, place, outcome, f"the trainer {how}")
    if shutil.disk_usage(run.directory.path).free < FULL_BYTES:
        print(f"{run.name}: the disk of {run.directory.path} is full", file=sys.stderr)


def _show_end_of_log(run: Run, place: Place, outcome: launch.Outcome, what: str) -> None:
    log = run.directory.log_of(place.rank)
    head = f"{run.name}: {what}; the last lines of {log}:"
    lines = [head, *(f"    {line}" for line in outcome.last_lines(TAIL_LINES))]
    print("\n".join(lines), file=sys.stderr)  # at once: other runs may write there too


def _since(began: float) -> str:
    return progress.duration(time.monotonic() - began)
