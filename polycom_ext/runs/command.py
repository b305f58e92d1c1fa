"""`polycom run CONFIG …`: start training runs on this machine, or go on with them."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from polycom_ext import arguments, shipped, upstream
from polycom_ext.errors import PolycomError
from polycom_ext.runs import local, progress
from polycom_ext.runs.adapter import Adapter, find, trees
from polycom_ext.runs.rendering import render
from polycom_ext.runs.rundir import RunDirectory
from polycom_ext.runs.spec import Spec, load

TAIL_LINES = 20
"""How much of the log is shown when a trainer fails."""
PATIENCE_SECONDS = 60.0
"""A run without a step after so long says what its trainer said last, and again after twice as long."""
FULL_BYTES = 1 << 20
"""A disk with less room than this counts as full."""


@dataclass(frozen=True)
class Run:
    """A spec, its trainer's adapter and its directory."""

    spec: Spec
    adapter: Adapter
    directory: RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", type=Path, help="run spec, a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of every spec, as in megatron.train-iters=20; null deletes it",
    )
    parser.add_argument(
        "--output",
        type=arguments.output,
        metavar="DIR",
        help="run directory (default: outputs/NAME); with several CONFIGs the folder of their directories",
    )
    parser.add_argument("--dry-run", action="store_true", help="print each command and write nothing")


def main(args: argparse.Namespace) -> int:
    """Check every run, then start one after the other; 0 if all are complete, 1 if a trainer failed."""
    runs = [_plan(config, args) for config in args.configs]
    _refuse_shared_directories(runs)
    if not args.dry_run:
        for run in runs:
            _prepare_upstreams(run)
    for run in runs:
        run.adapter.validate(run.spec)
        run.directory.check_resumable(run.spec, run.adapter)
        if not args.dry_run:
            run.adapter.check_inputs(run.spec)
            render(run.spec, run.adapter, run.directory.path).process_environment()
    for run in runs:
        status = _show(run) if args.dry_run else _start(run)
        if status:
            return status
    return 0


def _plan(config: Path, args: argparse.Namespace) -> Run:
    spec = load(shipped.find(config), args.set)
    if args.output is None:
        path = Path("outputs") / spec.name
    else:
        path = args.output if len(args.configs) == 1 else args.output / spec.name
    return Run(spec, find(spec.trainer), RunDirectory(path.absolute()))


def _refuse_shared_directories(runs: list[Run]) -> None:
    paths = [run.directory.path for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise PolycomError(
                f"more than one of these specs would write to {path}: give each its own `name:`"
            )


def _prepare_upstreams(run: Run) -> None:
    """A tree that asks for patches gets them; an activation that upstream knows runs on any tree."""
    for name in trees(run.adapter, run.spec):
        if run.adapter.needs_patches(run.spec) or not upstream.tree(name).exists():
            upstream.ensure_applied(name)


def _show(run: Run) -> int:
    for name in trees(run.adapter, run.spec):
        if not upstream.tree(name).exists():
            print(
                f"note: {name} is not here yet, so its option names were not checked: "
                f"`polycom upstream apply {name}`",
                file=sys.stderr,
            )
    print(render(run.spec, run.adapter, run.directory.path).script(), end="")
    for name, text in run.adapter.files(run.spec, run.directory.path).items():
        print(f"\n# {run.directory.path / name}:")
        for line in text.splitlines():
            print(f"#   {line}".rstrip())
    return 0


def _start(run: Run) -> int:
    spec, directory, name = run.spec, run.directory, run.spec.name
    if directory.is_finished(spec, run.adapter):
        step = run.adapter.latest_step(spec, directory.path)
        print(f"{name}: already complete at step {step}, nothing to do ({directory.path})", flush=True)
        return 0
    with directory.locked() as log:
        command = render(spec, run.adapter, directory.path)
        step = run.adapter.latest_step(spec, directory.path)
        directory.write(spec, run.adapter, command)
        directory.begin_attempt(log, step)
        how = "starting" if step is None else f"resuming from step {step}"
        print(f"{name}: {how}; everything it says goes to {directory.log}", flush=True)
        follower = _Follower(run)
        outcome = local.launch(command, log, follower)
        _note_end(run, outcome)
    seconds = progress.duration(time.monotonic() - follower.began)
    complete = run.adapter.is_complete(spec, directory.path)
    if outcome.interrupted is not None and not complete:
        print(
            f"{name}: stopped after {seconds}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 128 + outcome.interrupted
    if outcome.refusal is not None:
        raise PolycomError(f"{name}: {outcome.refusal}")
    if outcome.status != 0:
        _explain_failure(run, outcome)
        return 1
    if not complete and _did_nothing(run, follower, step):
        _show_end_of_log(run, outcome, "the trainer ended without a step and without an error")
        return 1
    if complete and spec.entry.learnable:
        _write_coefficients(run)
    how = "finished in" if complete else "ended before its last step, after"
    print(f"{name}: {how} {seconds} ({directory.path})", flush=True)
    return 0


class _Follower:
    """Prints what the trainer has logged since the last call; before the first record, what is waited for."""

    def __init__(self, run: Run) -> None:
        self.began = time.monotonic()
        self.records = 0
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
                    print(f"  {line}", flush=True)
            waited = time.monotonic() - self.began
            if not self.records and waited > self._patience:
                self._patience *= 2
                said = progress.last_line(self._log, self._log_start) or "nothing"
                print(f"  no step after {progress.duration(waited)}; the log ends with: {said}", flush=True)


def _note_end(run: Run, outcome: local.Outcome) -> None:
    """Note how the attempt ended; a full disk must not hide how that was."""
    try:
        complete = outcome.status == 0 and run.adapter.is_complete(run.spec, run.directory.path)
        run.directory.end_attempt(outcome.status, signal=outcome.interrupted, complete=complete)
    except (OSError, PolycomError) as error:
        print(f"{run.spec.name}: the end of this attempt could not be noted: {error}", file=sys.stderr)


def _did_nothing(run: Run, follower: _Follower, from_step: int | None) -> bool:
    """Whether a run of known length neither logged nor saved a step: upstream may give up with status 0."""
    known = run.adapter.total_steps(run.spec) is not None
    return (
        known and not follower.records and run.adapter.latest_step(run.spec, run.directory.path) == from_step
    )


def _write_coefficients(run: Run) -> None:
    """Write what a complete run has learned; it is complete whether they can be read or not."""
    try:
        learned = run.adapter.coefficients(run.spec, run.directory.path)
        if learned is not None:  # else the trainer has written them
            run.directory.write_coefficients(learned)
    except Exception as error:  # whatever reading a checkpoint raises: the training is done and saved
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{run.spec.name}: complete, but without coefficients.json: {reason}", file=sys.stderr)


def _explain_failure(run: Run, outcome: local.Outcome) -> None:
    if outcome.status < 0:
        how = f"was killed by {signal.Signals(-outcome.status).name}"
    else:
        how = f"failed with exit status {outcome.status}"
    _show_end_of_log(run, outcome, f"the trainer {how}")
    free = shutil.disk_usage(run.directory.path).free
    if free < FULL_BYTES:
        print(f"{run.spec.name}: the disk of {run.directory.path} is full", file=sys.stderr)


def _show_end_of_log(run: Run, outcome: local.Outcome, what: str) -> None:
    print(f"{run.spec.name}: {what}; the last lines of {run.directory.log}:", file=sys.stderr)
    for line in outcome.last_lines(TAIL_LINES):
        print(f"    {line}", file=sys.stderr)
