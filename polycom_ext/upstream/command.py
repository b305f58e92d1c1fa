"""`polycom upstream …`"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, pins, trees
from polycom_ext.upstream.pins import Pin
from polycom_ext.upstream.series import read_series
from polycom_ext.upstream.trees import State, Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each thing to do."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="the pinned upstreams and their state")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        command.add_argument("name", metavar="NAME", help="an upstream of patches/pins.toml")
        if name == "status":
            command.add_argument("--json", action="store_true", help="for a program")


def main(args: argparse.Namespace) -> int:
    """Do it; exit status 0 when all is well, 2 for an error; `status` has its own, see `trees.State`."""
    if args.command == "list":
        for pin in pins.load().values():
            print(f"{pin.name:12} {pin.version:10} {trees.status(pin).state.title:15} {trees.source_of(pin)}")
        return 0
    action, _ = COMMANDS[args.command]
    return action(pins.get(args.name), args)


def _fetch(pin: Pin, args: argparse.Namespace) -> int:
    print(f"{pin.name} {pin.version}: {fetch.fetch(pin)}")
    return 0


def _apply(pin: Pin, args: argparse.Namespace) -> int:
    fetch.fetch(pin)
    _print(trees.apply(pin))
    return 0


def _unapply(pin: Pin, args: argparse.Namespace) -> int:
    _print(trees.unapply(pin))
    return 0


def _status(pin: Pin, args: argparse.Namespace) -> int:
    found = trees.status(pin)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _print(found)
    return found.state.exit_status


def _verify(pin: Pin, args: argparse.Namespace) -> int:
    problems = trees.verify(pin)
    if problems:
        raise PolycomError(f"{pin.name}: {'; '.join(problems)}")
    print(f"{pin.name} {pin.version}: source, headers and series ({_count(pin)}) are right")
    return 0


def _refresh(pin: Pin, args: argparse.Namespace) -> int:
    for path in trees.refresh(pin):
        print(path)
    return 0


def _count(pin: Pin) -> str:
    number = len(read_series(pin.series))
    return f"{number} patch{'' if number == 1 else 'es'}"


def _print(found: Status) -> None:
    print(f"{found.pin.name} {found.pin.version}: {found.state.title} ({_count(found.pin)}), {found.tree}")
    if found.state in (State.PARTLY, State.DRIFTED):
        for title, files in (
            ("not ours", found.foreign),
            ("patched", found.patched),
            ("not patched", found.unpatched),
        ):
            for path in files:
                print(f"  {title:12} {path}")


COMMANDS: dict[str, tuple[Callable[[Pin, argparse.Namespace], int], str]] = {
    "fetch": (_fetch, "download, verify and unpack it"),
    "apply": (_apply, "fetch it if need be, and apply its patches: all or nothing"),
    "status": (
        _status,
        "tell what state its tree is in (exit status: 0 applied, 3 pristine, 4 partly applied, "
        "5 drifted, 6 absent)",
    ),
    "verify": (_verify, "check hashes, series and headers, and that the patches apply and reverse exactly"),
    "unapply": (_unapply, "undo the patches"),
    "refresh": (_refresh, "write the tree's commits back as patches"),
}
