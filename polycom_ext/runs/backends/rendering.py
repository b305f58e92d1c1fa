"""The templates in `launch/`, filled; and the command that is the same on every node."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from polycom_ext import shipped
from polycom_ext.runs.plan import Run
from polycom_ext.runs.rendering import Expression

JOB_SCRIPT, NODE_SCRIPT = "job.sh", "node.sh"
"""In the run directory: what a job system is given, and what each node executes."""
_PLACE = re.compile(r"@([A-Z][A-Z_]*)@")


class Verbatim(str):
    """A text that goes into a template as it is."""


def fill(template: str, values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    """A file of `launch/` with each @NAME@ in it replaced by its value, quoted.

    Args:
        quote: how a value is written, whatever it holds, unless it is `Verbatim`: `shell` for a script.
    """
    text = (shipped.folder("launch") / template).read_text(encoding="utf-8")

    def filled(place: re.Match[str]) -> str:
        value = values[place[1]]
        return str(value) if isinstance(value, Verbatim) else quote(value)

    return _PLACE.sub(filled, text)


def shell(value: Any) -> str:
    """One word, or the words of a list; an `Expression` is expanded by the shell, within its word."""
    if isinstance(value, list | tuple):
        return " ".join(map(shell, value))
    return f'"{value}"' if isinstance(value, Expression) else shlex.quote(str(value))


def node_command(run: Run) -> list[str]:
    """`polycom node RUN_DIR`, by the Python that plans the run or in the site's container."""
    if run.site.container is None:
        return [sys.executable, "-m", "polycom_ext.cli", "node", str(run.directory.path)]
    return ["polycom", "node", str(run.directory.path)]


def node_script(run: Run, command: list[str], trial: list[str] | None = None) -> str:
    """What each node executes: the site's setup, then the command in its place.

    Args:
        trial: a command before it, whose failure is the node's; for one that cannot say that it has failed.
    """
    setup = [*(run.site.setup or [":"]), *([] if trial is None else [shell(trial)])]
    values = {
        "DIRECTORY": run.command.directory,
        "RECORD": run.directory.path,
        "SETUP": Verbatim("\n".join(setup)),
        "COMMAND": command,
    }
    return fill("node.sh", values, shell)
