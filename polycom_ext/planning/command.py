"""`polycom plan CONFIG …`: what runs need, before anything of them is started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from polycom_ext import shipped
from polycom_ext.errors import PolycomError
from polycom_ext.machine import peaks
from polycom_ext.planning import search, text
from polycom_ext.planning.plan import Line, Plan, by_part, plan, total
from polycom_ext.planning.search import Choice
from polycom_ext.planning.text import MFU, ORIGIN, Device
from polycom_ext.runs import rehearse

DEVICE = "A100-SXM4-80GB"
"""The paper's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("configs", nargs="+", metavar="CONFIG", type=Path, help="run spec, a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of every spec, as `polycom run` has it",
    )
    parser.add_argument(
        "--each", action="append", default=[], metavar="KEY=A,B,C", help="a run for each value, likewise"
    )
    parser.add_argument("--nodes", metavar="N", help="as --set nodes=N")
    parser.add_argument("--processes-per-node", metavar="M", help="as --set processes_per_node=M")
    parser.add_argument(
        "--device", default=DEVICE, metavar="NAME", help=f"a GPU by its driver's name (default: {DEVICE})"
    )
    parser.add_argument(
        "--memory", type=_positive, metavar="GIB", help="of each device (default: that of --device)"
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=MFU,
        metavar="SHARE",
        help=f"of the device's peak that the model's own FLOPs reach (default: {MFU}: {ORIGIN})".replace(
            "%", "%%"
        ),
    )
    rehearse.add_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="show the arithmetic, a line a term")
    parser.add_argument("--json", action="store_true", help="a list of objects, sizes in bytes")
    parser.set_defaults(only_prints=True)


def main(args: argparse.Namespace) -> int:
    """Print the plan of one run, or a table of several; 0 also where something does not fit."""
    device = _device(args)
    changes = [*args.set, *_counts(args)]
    load_each = rehearse.loader(args)
    chosen = [spec for c in args.configs for spec in load_each(shipped.find(c), changes, args.each)]
    plans = [plan(spec) for spec in chosen]
    if args.json:
        print(json.dumps([_object(one, device) for one in plans], indent=2))
        return 0
    shown = []
    if len(plans) == 1:
        [one] = plans
        rows = search.scaling(one.spec, device.limit)
        shown.append(text.block(one, device, _smallest(one, device), rows))
    else:
        shown.append(text.table(plans, device))
    if args.explain:
        for one in plans:
            shown += [f"\n{one.spec.name}" if len(plans) > 1 else "", text.explained(one)]
    print("\n".join(shown))
    return 0


def _smallest(one: Plan, device: Device) -> Choice | None:
    return None if one.bytes <= device.limit else search.smallest(one.spec, device.limit)


def _object(one: Plan, device: Device) -> dict[str, Any]:
    fits = one.bytes <= device.limit
    choice = _smallest(one, device)
    hours = one.gpu_hours(device.mfu * device.flops)
    return {
        "run": one.spec.name,
        "activation": one.spec.activation,
        "layout": one.layout.shape,
        "gpus": one.gpus,
        "parameters": total(one.parameters),
        "active_parameters": total(one.active),
        "steps": one.steps,
        "tokens": one.tokens,
        "flops_per_token": one.flops_per_token,
        "flops": one.flops,
        "device": device.name,
        "mfu": device.mfu,
        "gpu_hours": hours,
        "days": None if hours is None else hours / one.gpus / 24,
        "memory": {"fullest": one.stage.title, "total": one.bytes, **by_part(one.memory)},
        "memory_limit": device.limit,
        "fits": fits,
        "smallest_that_fits": None
        if choice is None
        else {"set": choice.changes, "memory": choice.plan.bytes},
        "checkpoint": {"total": total(one.checkpoint), **by_part(one.checkpoint)},
        "sent_in_a_step": by_part(one.traffic),
        "scaling": [_row(gpus, there, device) for gpus, there in search.scaling(one.spec, device.limit)],
        "notes": one.layout.notes,
        "terms": {
            "parameters": _terms(one.parameters),
            "memory": _terms(one.memory),
            "checkpoint": _terms(one.checkpoint),
            "sent_in_a_step": _terms(one.traffic),
        },
    }


def _row(gpus: int, choice: Choice | None, device: Device) -> dict[str, Any]:
    if choice is None:
        return {"gpus": gpus, "fits": False}
    there = choice.plan
    return {
        "gpus": gpus,
        "fits": True,
        "set": choice.changes,
        "layout": there.layout.shape,
        "micro_batches": there.layout.micro_batches,
        "bubble": float(there.layout.bubble),
        "memory": there.bytes,
        "sent_in_a_step": total(there.traffic),
    }


def _terms(lines: tuple[Line, ...]) -> list[dict[str, Any]]:
    return [{"part": one.part, "of": one.title, "value": one.value, "formula": one.formula} for one in lines]


def _device(args: argparse.Namespace) -> Device:
    flops, memory = peaks.peak_flops(args.device), peaks.memory(args.device)
    if args.memory is not None:
        memory = args.memory * 2**30
    if flops is None or memory is None:
        raise PolycomError(
            f"--device {args.device!r}: its {'peak' if flops is None else 'memory'} is not known here; name "
            "a GPU as its driver does, as in H100, H200, A100-SXM4-40GB"
        )
    return Device(args.device, flops, memory, args.mfu)


def _positive(given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is no number above 0")
    return number


def _share(given: str) -> float:
    number = _positive(given)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{given!r} is more than all: give a share of 1, such as 0.4")
    return number


def _counts(args: argparse.Namespace) -> list[str]:
    given = {"nodes": args.nodes, "processes_per_node": args.processes_per_node}
    return [f"{key}={value}" for key, value in given.items() if value is not None]
