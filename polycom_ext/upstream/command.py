"""`polycom upstream …`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from polycom_ext import arguments
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import checkout, fetch, maintain, pins, trees
from polycom_ext.upstream.pins import Pin
from polycom_ext.upstream.trees import State, Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each thing to do."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary, names) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if names is not None:
            about = "upstreams of patches/pins.toml" + ("" if names == "+" else "; all unless given")
            command.add_argument("names", metavar="NAME", nargs=names, help=about)
        command.set_defaults(only_prints=name in ("list", "status", "verify"), tree=None)
        if name in ("apply", "status", "verify", "unapply"):
            about = "a checkout of your own of that version, instead of the one kept here"
            command.add_argument("--tree", metavar="PATH", type=arguments.output, help=about)
        if name == "apply":
            about = "with --tree: commit the patches there, on a new branch"
            command.add_argument("--branch", metavar="NAME", help=about)
        if name == "status":
            command.add_argument(
                "--json",
                action="store_true",
                help="for a program: an object, or an array of them unless one NAME is given",
            )


def main(args: argparse.Namespace) -> int:
    """Do it; exit status 0 when all is well, 2 for an error; `status` and `verify` have their own besides."""
    names = getattr(args, "names", [])
    if args.tree is not None and len(names) != 1:
        raise PolycomError("--tree is a checkout of one upstream: name that one")
    chosen = [pins.get(name) for name in names] if names else list(pins.load().values())
    action, _, _ = COMMANDS[args.command]
    return action(chosen, args)


def _list(chosen: list[Pin], args: argparse.Namespace) -> int:
    for pin in chosen:
        print(f"{pin.name:12} {pin.version:10} {trees.status(pin).state.title:15} {pin.described}")
    return 0


def _fetch(chosen: list[Pin], args: argparse.Namespace) -> int:
    for pin in chosen:
        print(f"{pin.name} {pin.version}: {fetch.fetch(pin)}")
    return 0


def _apply(chosen: list[Pin], args: argparse.Namespace) -> int:
    if args.branch is not None and args.tree is None:
        raise PolycomError("--branch is of a checkout of your own: name that with --tree")
    for pin in chosen:
        if args.tree is None:
            fetch.fetch(pin)
            _print(trees.apply(pin))
        else:
            _print(checkout.apply(pin, args.tree, args.branch))
    return 0


def _unapply(chosen: list[Pin], args: argparse.Namespace) -> int:
    for pin in chosen:
        _print(trees.unapply(pin) if args.tree is None else checkout.unapply(pin, args.tree))
    return 0


def _status(chosen: list[Pin], args: argparse.Namespace) -> int:
    found = [trees.status(pin) if args.tree is None else checkout.status(pin, args.tree) for pin in chosen]
    if args.json:
        told = [status.as_json() for status in found]
        print(json.dumps(told[0] if len(args.names) == 1 else told, indent=2))
    else:
        for status in found:
            _print(status)
    return max(status.state.exit_status for status in found)


def _verify(chosen: list[Pin], args: argparse.Namespace) -> int:
    wrong = False
    for pin in chosen:
        problems = maintain.verify(pin) if args.tree is None else checkout.verify(pin, args.tree)
        wrong = wrong or bool(problems)
        for problem in problems:
            print(f"{pin.name}: {problem}", file=sys.stderr)
        if not problems:
            what = "source" if args.tree is None else "checkout"
            print(f"{pin.name} {pin.version}: {what} and series are right")
    return 1 if wrong else 0


def _refresh(chosen: list[Pin], args: argparse.Namespace) -> int:
    for pin in chosen:
        for path in maintain.refresh(pin):
            print(path)
    return 0


def _print(found: Status) -> None:
    count = f"{len(found.patches)} patch{'' if len(found.patches) == 1 else 'es'}"
    print(f"{found.pin.name} {found.pin.version}: {found.state.title} ({count}), {found.tree}")
    if found.outdated:
        print("  made from another version than the one that is pinned: move it away, then fetch again")
    if found.state in (State.PARTLY, State.DRIFTED):
        lists = (("not ours", found.foreign), ("patched", found.patched), ("not patched", found.unpatched))
        for title, files in lists:
            for path in files:
                print(f"  {title:12} {path}")


COMMANDS: dict[str, tuple[Callable[[list[Pin], argparse.Namespace], int], str, str | None]] = {
    "list": (_list, "the pinned upstreams and their state", None),
    "fetch": (_fetch, "download, verify and unpack", "+"),
    "apply": (_apply, "fetch if need be, and apply the patches: all or nothing", "+"),
    "status": (
        _status,
        "tell what state a tree is in (exit status, the greatest of all asked for: 0 applied, 3 pristine, "
        "4 partly applied, 5 drifted, 6 absent)",
        "*",
    ),
    "verify": (
        _verify,
        "check hashes, series, headers, and that the patches apply and reverse (exit status 1 if not)",
        "*",
    ),
    "unapply": (_unapply, "undo the patches", "+"),
    "refresh": (_refresh, "write the tree's commits back as patches", "+"),
}
"""name -> (what it does, its line of help, how many names it takes)"""
