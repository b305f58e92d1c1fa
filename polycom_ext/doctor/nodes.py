"""`polycom doctor --nodes N`, given on each of N nodes: whether they are alike and well, and which is not."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from polycom_ext import arguments
from polycom_ext.errors import PolycomError
from polycom_ext.runs import launch, preflight
from polycom_ext.runs import site as sites
from polycom_ext.runs.lobby import DONE, FAILED, SIGNALLED, Parted, Stopped, Verdict
from polycom_ext.runs.lobby.guest import Guest
from polycom_ext.runs.lobby.host import Host
from polycom_ext.runs.lobby.network import Address
from polycom_ext.runs.rendering import NODE_RANK, RENDEZVOUS
from polycom_ext.runs.wishes import Wishes

TITLE = "polycom doctor"
"""By which a node knows that it has called the right one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the comparison takes."""
    parser.add_argument(
        "--nodes",
        type=arguments.count,
        metavar="N",
        help="compare N nodes, each of which is given this command (srun does): exit status 0 where they are "
        "alike and well, 2 where one is not, 1 where one does not come",
    )
    parser.add_argument(
        "--node-rank", metavar="R", help=f"which of them this is, 0 to N-1 (default: ${NODE_RANK})"
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help=f"a free port of node 0, which the others call (${RENDEZVOUS})",
    )
    parser.add_argument(
        "--site", metavar="SITE", help="of whose `preflight:` the limits are, a name or a file"
    )


def main(args: argparse.Namespace) -> int:
    """Meet the other nodes; node 0 prints what they have and what is wrong, the others what is wrong."""
    rank, at = _place(args)
    wishes = Wishes()
    if args.site is not None:
        wishes = Wishes.from_mapping(sites.load(sites.find(args.site)).preflight, args.site)
    ending = launch.Ending()
    with launch.handled(ending.hear):
        try:
            if rank == 0:
                return _host(at, args.nodes, wishes, ending)
            return _guest(at, rank, wishes, ending)
        except Stopped:
            return SIGNALLED + (ending.signal or 0)
        except Parted as error:
            print(f"polycom doctor: {error}", file=sys.stderr)
            return FAILED


def _place(args: argparse.Namespace) -> tuple[int, Address]:
    rank = os.environ.get(NODE_RANK, "") if args.node_rank is None else args.node_rank
    if not (rank.isascii() and rank.isdigit() and int(rank) < args.nodes):
        raise PolycomError(
            f"--node-rank {rank!r} is none of 0 to {args.nodes - 1}, as there are {args.nodes} nodes"
        )
    rendezvous = os.environ.get(RENDEZVOUS, "") if args.rendezvous is None else args.rendezvous
    try:
        return int(rank), Address.parse(rendezvous)
    except ValueError:
        raise PolycomError(f"--rendezvous {rendezvous!r} is no HOST:PORT of node 0") from None


def _host(at: Address, count: int, wishes: Wishes, ending: launch.Ending) -> int:
    host = Host(at, TITLE, count, wishes.silence)
    verdict = Verdict(FAILED, f"node 0 ({platform.node()}) came to grief", 0)
    try:
        present = host.gather(_facts(wishes), wishes.wait, ending)
        print(preflight.table(present))
        if wrong := preflight.compare(present, None, wishes):
            raise PolycomError("; ".join(wrong))
        if count > 1:
            host.open(0)
        verdict = Verdict(DONE)
    except PolycomError as error:
        host.turn_away(str(error), ending)
        raise
    finally:
        host.leave(verdict)
    print(f"\n{count} node{'s' * (count > 1)}, alike and well")
    return DONE


def _guest(at: Address, rank: int, wishes: Wishes, ending: launch.Ending) -> int:
    guest = Guest(at, TITLE, rank, wishes.silence)
    try:
        guest.join(_facts(wishes), wishes.wait, ending, lambda entry: None)
    finally:
        guest.close()
    return DONE


def _facts(wishes: Wishes) -> dict[str, object]:
    return preflight.look(None, wishes, Path("outputs"))
