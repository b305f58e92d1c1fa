"""`polycom stop RUN`: have a run end, wherever it was handed to."""

from __future__ import annotations

import argparse
from pathlib import Path

from polycom_ext.runs import backends, plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")


def main(args: argparse.Namespace) -> int:
    """Ask the backend that has the run; 0 once that was asked, whether it has ended or not."""
    run = plan.recorded(args.run)
    job = run.directory.read_job() or {}
    backends.find(job.get("backend", run.site.backend)).stop(run)
    return 0
