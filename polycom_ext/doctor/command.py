"""`polycom doctor`: what this machine has, what is wrong, and with --config whether a run can start."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from polycom_ext import arguments, shipped
from polycom_ext.doctor import judgement, nodes, run
from polycom_ext.doctor.findings import Finding, Mark, shown
from polycom_ext.errors import PolycomError
from polycom_ext.machine import look
from polycom_ext.machine.look import Machine
from polycom_ext.runs import plan, rehearse
from polycom_ext.runs.plan import Run
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import the_one

FOLDER = Path("outputs")
"""Where run directories are, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a run spec: exit status 0 only if that run can start on this machine, else 2",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the spec, as for run"
    )
    parser.add_argument(
        "--output", type=arguments.output, metavar="DIR", help="run directory (default: outputs/NAME)"
    )
    rehearse.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="an object: verdict, findings, facts")
    nodes.add_arguments(parser)
    parser.set_defaults(only_prints=True)


def main(args: argparse.Namespace) -> int:
    """Print the findings; 0 if this package, or the run, can do its work here, else 2."""
    if args.nodes is not None:
        if args.config is not None:
            raise PolycomError("--nodes compares machines; the nodes of a run are compared as it starts")
        return nodes.main(args)
    if args.config is None and (args.set or args.output or args.rehearse or args.rehearse_on_gpus):
        raise PolycomError("--set, --output and --rehearse are of a run: name its spec with --config")
    planned, wrong = None, []
    try:
        planned = _planned(args)
    except PolycomError as error:
        wrong = [Finding("spec", Mark.WRONG, str(error), stops=True)]
    looked, findings = _examined(planned)
    findings += wrong
    name = run.DISTRIBUTION if args.config is None else planned.name if planned else str(args.config)
    ready = not any(one.stops for one in findings)
    if args.json:
        objects = [one.as_json() for one in findings]
        told = {"ready": ready, "subject": name, "findings": objects, "machine": asdict(looked)}
        print(json.dumps(told, indent=2))
    else:
        print(f"{shown(findings)}\n\n{_verdict(name, findings)}")
    return 0 if ready else 2


def _planned(args: argparse.Namespace) -> Run | None:
    if args.config is None:
        return None
    path = shipped.find(args.config)
    spec = the_one(path, rehearse.loader(args)(path, args.set))
    return plan.planned(spec, args.output, FOLDER, Site())


def _examined(planned: Run | None) -> tuple[Machine, list[Finding]]:
    if planned is None:
        looked = look.look(FOLDER)
        return looked, [*judgement.judge(looked, None), *run.upstreams(None)]
    needs = planned.adapter.needs(planned.spec)
    looked = look.look(planned.directory.path, [*needs.modules, *needs.on_gpu])
    wants = judgement.Wants(
        processes=planned.spec.processes_per_node,
        nodes=planned.spec.nodes,
        gpu=needs.gpu,
        modules={**needs.modules, **(needs.on_gpu if looked.torch.devices else {})},
    )
    of_run = [*run.upstreams(planned), run.requirements(planned), *run.checks(planned)]
    return looked, [*judgement.judge(looked, wants), *of_run]


def _verdict(name: str, findings: list[Finding]) -> str:
    why = ", ".join(one.subject for one in findings if one.stops)
    can, cannot = "works here", "does not work here"
    if name != run.DISTRIBUTION:
        can, cannot = "can start here", "cannot start here"
    return f"{name} {cannot}, because of: {why}" if why else f"{name} {can}"
