"""`polycom report RUN_DIR [RUN_DIR …] --output DIR [--title TITLE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from polycom_ext import arguments
from polycom_ext.errors import needing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's output directory")
    parser.add_argument(
        "--output", required=True, type=arguments.output, metavar="DIR", help="where the report goes"
    )
    parser.add_argument("--title", default="PolyCom activations in pre-training", help="heading of the page")


def main(args: argparse.Namespace) -> int:
    """Write the report; print where it is and what it shows."""
    with needing("a report needs", "report"):
        from polycom_ext.report.page import write_report
    page, sentence = write_report(args.runs, args.output, args.title)
    print(f"Report: {page}")
    print(sentence)
    return 0
