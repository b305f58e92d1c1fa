"""A run before it is executed: its spec, adapter and directory, what is checked of them, and the record."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polycom_ext import upstream
from polycom_ext.errors import PolycomError
from polycom_ext.runs import secrets
from polycom_ext.runs import site as sites
from polycom_ext.runs import spec as specs
from polycom_ext.runs.adapter import Adapter, find, trees
from polycom_ext.runs.rendering import Command, render
from polycom_ext.runs.rundir import RunDirectory
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import Spec


@dataclass(frozen=True)
class Run:
    """A spec, its trainer's adapter, its directory and the place where it runs."""

    spec: Spec
    adapter: Adapter
    directory: RunDirectory
    site: Site

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def command(self) -> Command:
        """What each node runs."""
        return render(self.spec, self.adapter, self.directory.path, self.site.environment)

    def latest_step(self) -> int | None:
        """The step of the checkpoint from which it would go on."""
        return self.adapter.latest_step(self.spec, self.directory.path)

    def is_complete(self) -> bool:
        """Whether the checkpoint of the last step has been written."""
        return self.adapter.is_complete(self.spec, self.directory.path)

    def says_finished(self) -> bool:
        """Whether there is nothing left to do, which is said."""
        if not self.directory.is_finished(self.spec, self.adapter):
            return False
        where = f"step {self.latest_step()}, nothing to do ({self.directory.path})"
        print(f"{self.name}: already complete at {where}", flush=True)
        return True


def planned(spec: Spec, path: Path | None, folder: Path, site: Site) -> Run:
    """The run of a spec in the directory `path`, or in that of its name in `folder`."""
    return Run(spec, find(spec.trainer), RunDirectory((path or folder / spec.name).absolute()), site)


def recorded(path: Path) -> Run:
    """The run that a directory is of. Raises PolycomError if it is of none."""
    directory = RunDirectory(path.absolute())
    directory.read_spec()
    spec = specs.load(directory.spec)
    site = sites.load(directory.site) if directory.site.is_file() else Site()
    return Run(spec, find(spec.trainer), directory, site)


def prepare_trees(runs: list[Run]) -> None:
    """A tree that asks for patches gets them; an activation that upstream knows runs on any tree.

    The trees of a run in a container are the image's.
    """
    names = [
        name
        for run in runs
        if run.site.container is None
        for name in trees(run.adapter, run.spec)
        if run.adapter.needs_patches(run.spec) or not upstream.tree(name).exists()
    ]
    for name in dict.fromkeys(names):  # once for all that share it: to look at a tree takes seconds
        upstream.ensure_applied(name)


def check(run: Run) -> None:
    """Raise PolycomError for what could not run here, or not go on from what is in the directory."""
    run.adapter.validate(run.spec)
    run.directory.check_resumable(run.spec, run.adapter)


def check_inputs(run: Run) -> None:
    """Raise PolycomError for a file or a secret that is not there; a container may see other files."""
    if run.site.container is None:
        run.adapter.check_inputs(run.spec)
    secrets.check(run.command.environment)


def refuse_shared_directories(runs: list[Run]) -> None:
    """Raise PolycomError where two runs would write to one directory."""
    paths = [run.directory.path for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise PolycomError(
                f"more than one of these specs would write to {path}: give each its own `name:`"
            )


def show(run: Run, files: Mapping[str, str]) -> None:
    """Print the command, and the files that it and its backend need."""
    for name in trees(run.adapter, run.spec):
        if not upstream.tree(name).exists():
            print(
                f"note: {name} is not here yet, so its option names were not checked: "
                f"`polycom upstream apply {name}`",
                file=sys.stderr,
            )
    print(run.command.script(), end="")
    for name, text in {**run.adapter.files(run.spec, run.directory.path), **files}.items():
        print(f"\n# {run.directory.path / name}:")
        for line in text.splitlines():
            print(f"#   {line}".rstrip())
