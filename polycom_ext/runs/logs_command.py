"""`polycom logs RUN`: what the trainer of a node has said, and what is said of the job around it."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.runs import status
from polycom_ext.runs.rundir import RunDirectory

POLL_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--node", type=int, default=0, metavar="K", help="whose log, the first node's being 0 (default: 0)"
    )
    which.add_argument(
        "--job", action="store_true", help="what the job system and the nodes say, around the trainer"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="and what is added, until the run has ended"
    )
    parser.set_defaults(only_prints=True)


def main(args: argparse.Namespace) -> int:
    """Print a log, as it is; 0 at the end of it."""
    path = _log(args)
    with path.open("rb") as log:
        while True:
            goes_on = args.follow and status.read(args.run).is_going_on  # asked before the last look
            shutil.copyfileobj(log, sys.stdout.buffer)
            sys.stdout.flush()
            if not goes_on:
                return 0
            time.sleep(POLL_SECONDS)


def _log(args: argparse.Namespace) -> Path:
    directory = RunDirectory(args.run)
    nodes = directory.read_spec().get("nodes", 1)
    if not 0 <= args.node < nodes:
        raise PolycomError(f"{args.run} has no node {args.node}: its nodes are 0 to {nodes - 1}")
    path = directory.job_log if args.job else directory.log_of(args.node)
    if not path.is_file():
        raise PolycomError(f"{path} is not there: nothing was said yet, or no job system has the run")
    return path
