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
    trees = [str(upstream.tree(name)) for name in trainer.upstreams]
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return Command(
        arguments=[sys.executable, *launcher, *quiet, *trainer.arguments(spec, run_dir)],
        environment={
            "PYTHONPATH": os.pathsep.join([*trees, *(path for path in inherited if path not in trees)]),
            **trainer.environment(spec, run_dir),
            **spec.environment,
        },
        directory=Path.cwd(),
    )
