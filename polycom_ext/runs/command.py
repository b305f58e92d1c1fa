"""`polycom run CONFIG …`: plan training runs and have them executed, or gone on with."""

from __future__ import annotations

import argparse
from pathlib import Path

from polycom_ext import arguments, shipped
from polycom_ext.runs import backends, plan
from polycom_ext.runs.submit import submit


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
    parser.add_argument(
        "--jobs",
        type=arguments.count,
        default=1,
        metavar="N",
        help="runs at once, for those that leave processors idle (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print each command and write nothing")


def main(args: argparse.Namespace) -> int:
    """Check every run, then have them executed; 0, or the highest status of those that are not complete."""
    alone, folder = len(args.configs) == 1, args.output or Path("outputs")
    own = args.output if alone else None
    runs = [plan.planned(shipped.find(config), args.set, own, folder) for config in args.configs]
    plan.refuse_shared_directories(runs)
    if not args.dry_run:
        for run in runs:
            plan.prepare_trees(run)
    for run in runs:
        plan.check(run)
        if not args.dry_run:
            plan.check_inputs(run)
    if args.dry_run:
        for run in runs:
            plan.show(run)
        return 0
    return submit(runs, backends.find("local"), args.jobs)
