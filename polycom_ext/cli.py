"""`polycom …`: a thin door. Every verb is one call into one room."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError

VERBS = {
    "data": ("polycom_ext.data.command", "turn text into token files"),
    "report": ("polycom_ext.report.command", "tables and plots of finished runs"),
    "run": ("polycom_ext.runs.command", "start or resume a training run"),
    "upstream": ("polycom_ext.upstream.command", "fetch, patch and check the pinned trainers"),
}
"""verb -> (module with `add_arguments(parser)` and `main(args) -> int`, one line of help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a PolycomError becomes one sentence on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="polycom", description="PolyCom activations for pre-training.")
    parser.add_argument("--version", action="version", version=f"polycom-ext {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    module = None
    for verb, (path, summary) in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary.capitalize() + ".")
        if arguments[:1] == [verb]:
            module = importlib.import_module(path)
            module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    assert module is not None
    try:
        status: int = module.main(args)
        return status
    except PolycomError as error:
        print(f"polycom {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"polycom {args.verb}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
