"""`polycom …`: a thin door. Every verb is one call into one room."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polycom_ext import display
from polycom_ext._version import __version__
from polycom_ext.errors import PolycomError

VERBS = {
    "analyze": ("polycom_ext.analysis.command", "what training made of a checkpoint's weights and states"),
    "convert": ("polycom_ext.checkpoints.command", "bring a checkpoint into another form"),
    "data": ("polycom_ext.data.command", "turn text into token files"),
    "doctor": ("polycom_ext.doctor.command", "what this machine has, and whether a run can start here"),
    "eval": ("polycom_ext.evaluation.command", "tasks of lm-eval, and losses on token files, of checkpoints"),
    "logs": ("polycom_ext.runs.logs_command", "what a run's trainer and its job have said"),
    "node": ("polycom_ext.runs.node", "execute a planned run on this node of it"),
    "plan": (
        "polycom_ext.planning.command",
        "parameters, memory, traffic and time of a run before it starts",
    ),
    "report": ("polycom_ext.report.command", "tables and plots of finished runs"),
    "run": ("polycom_ext.runs.command", "start or resume a training run"),
    "status": ("polycom_ext.runs.status_command", "how runs stand: step, loss, time left, state"),
    "stop": ("polycom_ext.runs.stop_command", "have a run end"),
    "upstream": ("polycom_ext.upstream.command", "fetch, patch and check the pinned trainers"),
}
"""verb -> (module with `add_arguments(parser)` and `main(args) -> int`, one line of help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status, whatever becomes of what it prints.

    A PolycomError becomes one sentence on stderr and exit status 2; so does an OSError, such as a full disk
    or a folder that cannot be written. Where the output is all that was asked for, its loss is status 1, but
    for the reader's own end of a pipe: `polycom upstream status | head -1` is 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with display.tolerant() as shown:
        try:
            _have_a_home()
        except OSError as error:
            print(f"polycom: {display.printable(_sentence(error))}", file=sys.stderr)
            return 2
        args, module = _parse(arguments)
        try:
            status: int = module.main(args)
        except PolycomError as error:
            print(f"polycom {args.verb}: {display.printable(str(error))}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"polycom {args.verb}: {display.printable(_sentence(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"polycom {args.verb}: interrupted", file=sys.stderr)
            return 130
        sys.stdout.flush()
        lost = shown is not None and shown.lost is not None
        return status or int(lost and _only_prints(args))


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments of a verb and its module; of the others nothing is imported."""
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
    return args, module


def _have_a_home() -> None:
    """Give a container's user, who has neither $HOME nor an entry in passwd, the temporary folder as home.

    Libraries that keep caches and settings in it cannot be imported without one.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


def _only_prints(args: argparse.Namespace) -> bool:
    return getattr(args, "dry_run", False) or getattr(args, "only_prints", False)


def _sentence(error: OSError) -> str:
    """`PATH: No space left on device`, and the way out where there is only one."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; make room, then give the same command again"
    if reason.startswith("No usable temporary directory"):  # tempfile's own, which knows no way out
        reason += "; set TMPDIR to a folder that can be written"
    return ": ".join([" -> ".join(names), reason] if names else [reason])


if __name__ == "__main__":
    sys.exit(main())
