"""How a node's command is run in a container: by docker, podman or apptainer."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

from polycom_ext.errors import PolycomError, did_you_mean
from polycom_ext.runs import secrets
from polycom_ext.runs.plan import Run
from polycom_ext.runs.rendering import NODE_RANK, RENDEZVOUS, Expression
from polycom_ext.runs.site import Container

_ANY_GPU: Mapping[str, tuple[str, ...]] = {
    "network": ("--network", "host"),  # ranks of other nodes are reached as the machine's own
    # Who holds a run's directory is seen from outside. --init is not process 1 then, but has to bury orphans.
    "pid": ("--pid", "host", "--env", "TINI_SUBREAPER=1"),
    "ipc": ("--ipc", "host"),  # NCCL and data loaders share memory; a container's own is 64 MiB
    # RDMA pins its buffers; NCCL's and compilers' threads want deep stacks.
    "limits": ("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
    "infiniband": ("--device", "/dev/infiniband", "--cap-add", "IPC_LOCK"),
}
DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "docker": {**_ANY_GPU, "gpus": ("--gpus", "all")},
    "podman": {**_ANY_GPU, "pid": ("--pid", "host"), "gpus": ("--device", "nvidia.com/gpu=all")},
    # It shares network, IPC, limits and devices with its caller.
    "apptainer": {**dict.fromkeys(_ANY_GPU, ()), "gpus": ("--nv",)},
}
"""Engine -> what `container.off` switches off -> the engine's options for it: what a node with GPUs needs."""


def wrap(container: Container, run: Run, command: list[str]) -> list[str]:
    """The command line that runs `command` in the site's container, in the foreground.

    The run's directory and the working directory lie at their own paths inside, whoever runs it is the same
    user there, and signals reach the command. Variables are passed by their names: whoever runs it exports
    them. An `Expression` is for the shell to expand.

    Raises PolycomError for an unknown name in `container.off`, and for an engine that is no command.
    """
    engine = chosen(container)
    if engine not in DEFAULTS:
        raise PolycomError(
            f"{run.name}: {engine} is no command that starts a container; "
            f"container.engine may be {', '.join(DEFAULTS)} here"
        )
    defaults = DEFAULTS[engine]
    for one in container.off:
        if one not in defaults:
            raise PolycomError(
                f"{run.name}: container.off has no {one!r}{did_you_mean(one, defaults)}; "
                f"known: {', '.join(defaults)}"
            )
    needed = [word for name, words in defaults.items() if name not in container.off for word in words]
    words = _apptainer if engine == "apptainer" else _docker
    return [engine, *words(container, run, needed), container.image, *command]


def chosen(container: Container) -> str:
    """The engine that a site names, or docker."""
    return container.engine or "docker"


def named(run: Run, rank: int) -> str:
    """The name of a node's container: readable, and of no other run."""
    return f"{_name(run)}{rank}"


def _docker(container: Container, run: Run, needed: list[str]) -> list[str]:
    """Docker's words, which are podman's."""
    name = Expression(f"{_name(run)}${{{NODE_RANK}:-0}}")
    # podman has no init in the machine's process ids; orphans are buried by the monitor of the container.
    init = [] if container.engine == "podman" and "pid" not in container.off else ["--init"]
    line = ["run", "--rm", *init, "--name", name, *needed]
    line += ["--user", f"{os.getuid()}:{os.getgid()}"]
    if container.engine == "podman" and os.getuid() != 0:
        line += ["--userns", "keep-id"]
    line += ["--workdir", str(run.command.directory)]
    for path in _folders(run):
        line += ["--mount", _fields("type=bind", f"source={path}", f"target={path}")]
    for mount in container.mounts:
        line += ["--volume", mount if ":" in mount else f"{mount}:{mount}"]
    for variable in _variables(run):
        line += ["--env", variable]
    return [*line, *container.options]


def _apptainer(container: Container, run: Run, needed: list[str]) -> list[str]:
    """Variables of the caller's are seen inside anyway; packages in its home must not be."""
    line = ["exec", *needed, "--env", "PYTHONNOUSERSITE=1"]
    line += ["--pwd", str(run.command.directory)]
    for path in _folders(run):
        line += ["--mount", _fields("type=bind", f"source={path}", f"destination={path}")]
    for mount in container.mounts:
        line += ["--bind", mount]
    return [*line, *container.options]


def _folders(run: Run) -> list[Path]:
    """The working directory, and the run's own, which may lie in it or behind a link."""
    return list(dict.fromkeys((run.command.directory, run.directory.path)))


def _variables(run: Run) -> list[str]:
    """What the record does not tell a node: its place, and the secrets."""
    environment = run.command.environment
    return [
        NODE_RANK,
        RENDEZVOUS,
        *(name for name, value in environment.items() if secrets.is_secret(name, value)),
    ]


def _fields(*fields: str) -> str:
    """A line of comma-separated values, whatever they hold."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(fields)
    return line.getvalue().removesuffix("\n")


def _name(run: Run) -> str:
    path = str(run.directory.path)
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.name)[:40]
    return f"polycom-{readable}-{hashlib.sha256(path.encode()).hexdigest()[:8]}-node-"
