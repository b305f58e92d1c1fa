"""`polycom run CONFIG …`: plan training runs and have them executed, or gone on with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from polycom_ext import arguments, shipped
from polycom_ext.runs import backends, plan, rehearse
from polycom_ext.runs import site as sites
from polycom_ext.runs.site import Site
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
        "--each",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="a run for each value, named NAME-VALUE, as in activation=gelu,polynorm (default: the spec's)",
    )
    parser.add_argument(
        "--output",
        type=arguments.output,
        metavar="DIR",
        help="run directory (default: outputs/NAME); of several runs the folder of their directories",
    )
    parser.add_argument(
        "--jobs",
        type=arguments.count,
        default=1,
        metavar="N",
        help="runs at once, for those that leave processors idle (default: 1)",
    )
    parser.add_argument(
        "--site",
        metavar="FILE",
        help="what the place asks for, a YAML file, or the name of one in launch/sites (default: nothing)",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"who starts the nodes: {', '.join(backends.BACKENDS)} (default: the site's, else local)",
    )
    parser.add_argument("--nodes", metavar="N", help="as --set nodes=N")
    parser.add_argument("--processes-per-node", metavar="M", help="as --set processes_per_node=M")
    parser.add_argument(
        "--max-restarts",
        type=arguments.count_or_none,
        metavar="N",
        help="how often a run is started again that failed or was out of time (default: the site's)",
    )
    rehearse.add_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print each command, and what is rendered, and write nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Check every run, then have them executed; 0, or the highest status of those that are not complete."""
    changes = [*args.set, *_counts(args)]
    load_each = rehearse.loader(args)
    chosen = [spec for c in args.configs for spec in load_each(shipped.find(c), changes, args.each)]
    own, folder = args.output if len(chosen) == 1 else None, args.output or Path("outputs")
    site = _site(args)
    backend = backends.find(site.backend)
    runs = [plan.planned(spec, own, folder, site) for spec in chosen]
    plan.refuse_shared_directories(runs)
    if not args.dry_run:
        plan.prepare_trees(runs)
        rehearse.make_data(chosen)
    for run in runs:
        plan.check(run)
        if not args.dry_run:
            plan.check_inputs(run)
    if args.dry_run:
        for run in runs:
            plan.show(run, backend.files(run))
        return 0
    return submit(runs, backend, args.jobs)


def _site(args: argparse.Namespace) -> Site:
    site = Site() if args.site is None else sites.load(sites.find(args.site))
    given = {"backend": args.backend, "max_restarts": args.max_restarts}
    return replace(site, **{key: value for key, value in given.items() if value is not None})


def _counts(args: argparse.Namespace) -> list[str]:
    given = {"nodes": args.nodes, "processes_per_node": args.processes_per_node}
    return [f"{key}={value}" for key, value in given.items() if value is not None]
