"""Findings on one run: what it needs of this machine, and whether that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata

from polycom_ext.doctor.findings import Finding, Mark
from polycom_ext.errors import PolycomError
from polycom_ext.runs import plan, rehearse
from polycom_ext.runs.adapter import trees
from polycom_ext.runs.plan import Run
from polycom_ext.upstream import pins
from polycom_ext.upstream.trees import State, status

DISTRIBUTION = "polycom-ext"


def upstreams(run: Run | None) -> Iterator[Finding]:
    """Each pinned upstream and its state; of a run's trees, whether they are as it needs them."""
    needed = () if run is None else trees(run.adapter, run.spec)
    patched = run is not None and run.adapter.needs_patches(run.spec)
    for name, pin in pins.load().items():
        subject, way_out = f"upstream {name}", f"polycom upstream apply {name}"
        stops = name in needed
        try:
            found = status(pin)
        except PolycomError as error:
            yield Finding(subject, Mark.WRONG, str(error), stops=stops)
            continue
        text = f"{pin.version}: {found.state.title}"
        if run is not None and not stops:
            yield Finding(subject, Mark.UNNEEDED, text)
        elif found.state is State.APPLIED:
            yield Finding(subject, Mark.OK, f"{text}, {len(found.patches)} patches")
        elif found.state is State.ABSENT:
            mark = Mark.MISSING if stops else Mark.UNNEEDED
            yield Finding(subject, mark, text, way_out, stops)
        elif found.state is State.PRISTINE:
            mark = Mark.MISSING if patched or run is None else Mark.OK
            yield Finding(subject, mark, text, way_out if mark is Mark.MISSING else "", stops and patched)
        else:
            yield Finding(subject, Mark.WRONG, text, f"polycom upstream status {name}", stops and patched)


def requirements(run: Run) -> Finding:
    """The packages that this one names for the run's trainer, and their versions."""
    extra = f"{DISTRIBUTION}[{run.adapter.name}]"
    try:
        from packaging.requirements import Requirement

        named = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except ImportError as error:  # of packaging, or PackageNotFoundError
        return Finding(
            "packages", Mark.MISSING, f"not compared with {extra}: {error}", "pip install packaging"
        )
    asked = [
        one
        for one in named
        if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in ("", run.adapter.name))
    ]
    problems = []
    for one in asked:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{one.name} is not installed")
            continue
        if not one.specifier.contains(version, prereleases=True):
            problems.append(f"{one.name} {version} is not {one.specifier}")
    if problems:
        return Finding("packages", Mark.WRONG, "; ".join(problems), f"pip install '{extra}'", stops=True)
    return Finding("packages", Mark.OK, f"{len(asked)} of {extra}")


def checks(run: Run) -> Iterator[Finding]:
    """What `polycom run` itself checks before it starts."""
    steps: dict[str, tuple[Callable[[Run], None], str]] = {
        "spec": (plan.check, f"{run.spec.activation} on {run.adapter.name}, for {run.directory.path}"),
        "inputs": (plan.check_inputs, "files and secrets are there"),
    }
    if not rehearse.has_data(run.spec):
        steps["inputs"] = (lambda run: None, "its token files are made when it is first started")
    for subject, (check, text) in steps.items():
        try:
            check(run)
        except PolycomError as error:
            yield Finding(subject, Mark.WRONG, str(error), stops=True)
        else:
            yield Finding(subject, Mark.OK, text)
