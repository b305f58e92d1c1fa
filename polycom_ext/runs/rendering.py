"""A spec as the one command that runs it."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from polycom_ext import upstream
from polycom_ext.runs.spec import Spec
from polycom_ext.runs.trainer import Trainer

BREAK = " \\\n    "
"""A shell line that goes on, indented, in the next."""


@dataclass(frozen=True)
class Command:
    """An argument vector, and the environment variables that it needs beyond those of the caller."""

    arguments: list[str]
    environment: dict[str, str]
    directory: Path
    """Where it is run: relative paths in a spec are relative to it."""

    def script(self) -> str:
        """The command as a shell script, one option a line."""
        lines = ["#!/bin/sh", f"cd {shlex.quote(str(self.directory))} || exit"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        text = "exec"
        for argument in self.arguments:
            starts_line = argument == "-m" or argument.startswith("--")
            text += f"{BREAK if starts_line else ' '}{shlex.quote(argument)}"
        return "\n".join([*lines, text]) + "\n"


def render(spec: Spec, trainer: Trainer, run_dir: Path) -> Command:
    """The command for this machine. Writes nothing."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.processes)]
    quiet = [
        "--log-dir",
        os.devnull,
    ]  # or it leaves an empty folder for every start among the temporary files
    environment = {**trainer.environment(spec, run_dir), **spec.environment}
    # The trees first, so that neither the spec nor the caller can hide them.
    paths = [str(upstream.tree(name)) for name in trainer.upstreams]
    for given in (environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")):
        paths += [path for path in given.split(os.pathsep) if path and path not in paths]
    return Command(
        arguments=[sys.executable, *launcher, *quiet, *trainer.arguments(spec, run_dir)],
        environment={"PYTHONPATH": os.pathsep.join(paths), **environment},
        directory=Path.cwd(),
    )
