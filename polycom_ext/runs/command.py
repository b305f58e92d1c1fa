"""`polycom run CONFIG …`: start training runs on this machine, or go on with them."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from polycom_ext import upstream
from polycom_ext.errors import PolycomError
from polycom_ext.runs import local, progress, trainer
from polycom_ext.runs.rendering import render
from polycom_ext.runs.rundir import RunDirectory
from polycom_ext.runs.spec import Spec, load
from polycom_ext.runs.trainer import Trainer

TAIL_LINES = 20
"""How much of the log is shown when a trainer fails."""


@dataclass(frozen=True)
class Run:
    """A spec, its trainer's adapter and its directory."""

    spec: Spec
    trainer: Trainer
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
        type=Path,
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
        run.trainer.validate(run.spec)
        run.directory.check_resumable(run.spec, run.trainer)
        if not args.dry_run:
            run.trainer.check_inputs(run.spec)
    for run in runs:
        status = _show(run) if args.dry_run else _start(run)
        if status:
            return status
    return 0


def _plan(config: Path, args: argparse.Namespace) -> Run:
    spec = load(config, args.set)
    if args.output is None:
        path = Path("outputs") / spec.name
    else:
        path = args.output if len(args.configs) == 1 else args.output / spec.name
    return Run(spec, trainer.find(spec.trainer), RunDirectory(path.absolute()))


def _refuse_shared_directories(runs: list[Run]) -> None:
    paths = [run.directory.path for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise PolycomError(
                f"more than one of these specs would write to {path}: give each its own `name:`"
            )


def _prepare_upstreams(run: Run) -> None:
    """A tree that asks for patches gets them; an activation that upstream knows runs on any tree."""
    for name in run.trainer.upstreams:
        needs_patches = run.trainer.name not in run.spec.entry.native
        if needs_patches or not upstream.tree(name).exists():
            upstream.ensure_applied(name)


def _show(run: Run) -> int:
    for name in run.trainer.upstreams:
        if not upstream.tree(name).exists():
            print(
                f"note: {name} is not here yet, so its option names were not checked: "
                f"`polycom upstream apply {name}`",
                file=sys.stderr,
            )
    print(render(run.spec, run.trainer, run.directory.path).script(), end="")
    for name, text in run.trainer.files(run.spec, run.directory.path).items():
        print(f"\n# {run.directory.path / name}:")
        for line in text.splitlines():
            print(f"#   {line}".rstrip())
    return 0


def _start(run: Run) -> int:
    spec, directory, name = run.spec, run.directory, run.spec.name
    if directory.is_finished(spec, run.trainer):
        step = run.trainer.latest_step(spec, directory.path)
        print(f"{name}: already complete at step {step}, nothing to do ({directory.path})", flush=True)
        return 0
    with directory.locked() as log:
        command = render(spec, run.trainer, directory.path)
        directory.write(spec, run.trainer, command)
        step = run.trainer.latest_step(spec, directory.path)
        directory.begin_attempt(log, step)
        how = "starting" if step is None else f"resuming from step {step}"
        print(f"{name}: {how}; everything it says goes to {directory.log}", flush=True)
        began = time.monotonic()
        outcome = local.launch(command, log, _follow(run))
        directory.end_attempt(outcome.status)
    seconds = progress.duration(time.monotonic() - began)
    if outcome.interrupted is not None and not run.trainer.is_complete(spec, directory.path):
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
    if run.trainer.is_complete(spec, directory.path) and spec.entry.coefficients:
        directory.write_coefficients(run.trainer.coefficients(spec, directory.path))
    how = (
        "finished in"
        if run.trainer.is_complete(spec, directory.path)
        else "ended before its last step, after"
    )
    print(f"{name}: {how} {seconds} ({directory.path})", flush=True)
    return 0


def _follow(run: Run) -> local.Tick:
    """A function that prints what the trainer has logged since it was last called."""
    tail = progress.MetricsTail(run.directory.metrics)
    total = run.trainer.total_steps(run.spec)

    def show_new_records() -> None:
        for record in tail.records():
            line = progress.format_record(record, total)
            if line is not None:
                print(f"  {line}", flush=True)

    return show_new_records


def _explain_failure(run: Run, outcome: local.Outcome) -> None:
    if outcome.status < 0:
        how = f"was killed by {signal.Signals(-outcome.status).name}"
    else:
        how = f"failed with exit status {outcome.status}"
    print(f"{run.spec.name}: the trainer {how}; the last lines of {run.directory.log}:", file=sys.stderr)
    for line in outcome.last_lines(TAIL_LINES):
        print(f"    {line}", file=sys.stderr)
