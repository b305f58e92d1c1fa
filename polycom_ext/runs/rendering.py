"""A spec as the one command that runs it, on each of its nodes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polycom_ext import upstream
from polycom_ext.runs import adapter as contract
from polycom_ext.runs import secrets
from polycom_ext.runs.adapter import Adapter
from polycom_ext.runs.spec import Spec

BREAK = " \\\n    "
"""A shell line that goes on, indented, in the next."""

NODE_RANK, RENDEZVOUS, ADDRESS = "POLYCOM_NODE_RANK", "POLYCOM_RENDEZVOUS", "POLYCOM_ADDRESS"
"""Variables by which the command knows its node: 0 is the first one, whose HOST:PORT the others call; the
address is the node's own, as the others reach it."""


class Expression(str):
    """An argument that the shell is to expand."""


LAUNCHER = {
    "rdzv-backend": "c10d",
    "max-restarts": "0",
    "log-dir": os.devnull,  # or it leaves an empty folder for every start among the temporary files
}
"""What every run says to torch.distributed.run."""
ONE_NODE = {"rdzv-endpoint": "127.0.0.1:0", "local-addr": "127.0.0.1"}
"""`--standalone` would have the processes meet under the machine's name, and a name that does not resolve is
waited for without a word."""
NODES = {
    "rdzv-endpoint": Expression(f"${RENDEZVOUS}"),
    "rdzv-conf": Expression(f"is_host=$(({NODE_RANK} == 0))"),  # whatever name it has for the others
    "local-addr": Expression(f"${{{ADDRESS}-}}"),  # else the machine's name, which the others may not know
}
ENVIRONMENT = {
    "PYTHONIOENCODING": "utf-8:backslashreplace",  # the log takes whatever the terminal cannot show
}
ONE_NODE_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",  # otherwise gloo asks for the address of the machine's name
}
FOREIGN_PREFIXES = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")
FOREIGN = (
    *("MASTER_ADDR", "MASTER_PORT", "PYTHON_EXEC"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "FS_LOCAL_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
"""Variables of another launch, as in a cluster's job: torch.distributed.run takes the defaults of its options
from PET_…, workers their place from the others. A run inherits none of them, but its spec may set them."""


@dataclass(frozen=True)
class Command:
    """An argument vector, and the environment variables that it needs beyond those of the caller."""

    arguments: list[str]
    environment: dict[str, str]
    """A value `${NAME}` under NAME stands for the caller's own."""
    directory: Path
    """Where it is run: relative paths in a spec are relative to it."""

    def script(self) -> str:
        """The command as a shell script, one option a line; it asks its caller for the secrets."""
        prefixes = "; ".join(rf"s/^\({prefix}[A-Za-z0-9_]*\)=.*/\1/p" for prefix in FOREIGN_PREFIXES)
        lines = [
            "#!/bin/sh",
            f"cd {shlex.quote(str(self.directory))} || exit",
            '[ -n "$HOME" ] || id -un > /dev/null 2>&1 || export HOME="${TMPDIR:-/tmp}"',
            "# shellcheck disable=SC2046 # names are to be words",
            f"unset {' '.join(FOREIGN)}{BREAK}$(env | sed -n '{prefixes}')",
        ]
        for name, value in secrets.masked(self.environment).items():
            if value == secrets.reference(name):
                lines.append(f': "${{{name}?is kept in no record: set it first}}"; export {name}')
            else:
                lines.append(f"export {name}={shlex.quote(value)}")
        text = "exec"
        for argument in self.arguments:
            starts_line = argument == "-m" or argument.startswith("--")
            word = f'"{argument}"' if isinstance(argument, Expression) else shlex.quote(argument)
            text += f"{BREAK if starts_line else ' '}{word}"
        return "\n".join([*lines, text]) + "\n"


def render(
    spec: Spec,
    adapter: Adapter,
    run_dir: Path,
    beneath: Mapping[str, str] = {},
    program: Sequence[str] = (),
) -> Command:
    """The command, the same on each node. Writes nothing.

    Args:
        beneath: a site's variables, to which the spec's own add.
        program: what the processes run in place of the trainer.
    """
    alone = spec.nodes == 1
    stated = {
        "nnodes": str(spec.nodes),
        "nproc-per-node": str(spec.processes_per_node),
        **LAUNCHER,
        **(ONE_NODE if alone else {**NODES, "rdzv-id": spec.name}),
    }
    launcher = ["-m", "polycom_ext.runs.torchrun"]
    launcher += [part for name, value in stated.items() for part in (f"--{name}", value)]
    environment = {**ENVIRONMENT, **(ONE_NODE_ENVIRONMENT if alone else {})}
    environment |= {**adapter.environment(spec, run_dir), **beneath, **spec.environment}
    # The trees first, so that neither the spec nor the caller can hide them.
    paths = [str(upstream.tree(name)) for name in contract.trees(adapter, spec)]
    for given in (environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")):
        paths += [path for path in given.split(os.pathsep) if path and path not in paths]
    return Command(
        arguments=[sys.executable, *launcher, *(program or adapter.arguments(spec, run_dir))],
        environment={"PYTHONPATH": os.pathsep.join(paths), **environment},
        directory=Path.cwd(),
    )
