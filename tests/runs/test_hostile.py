"""Whatever a field holds, the run is refused in a sentence, or nothing of it is executed and nothing lost."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.runs import backends, document, plan
from polycom_ext.runs import site as sites
from polycom_ext.runs.spec import load
from polycom_ext.runs.submit import submit

from .conftest import THIRD_PARTY
from .hostile import SAMPLE
from .kubelet import expanded
from .test_kubernetes import pods

STAND_IN = r"""#!/bin/sh
name=${0##*/}
printf '%s\0' "$name" "$PWD" "$@" > "$STAND_INS_TELL/$$-$name"
case $name in
ssh)
    for word; do last=$word; [ "$word" != -G ] || { echo hostname node; exit; }; done
    eval "$last" ;;
srun) while [ "$1" != bash ]; do shift; done; exec "$@" ;;
scontrol) echo "NodeName=node NodeAddr=node" ;;
sbatch) echo 1 ;;
esac
"""
"""Writes down how it was called, and does no more than the next one needs."""
CASES_OF_PODS = ("TrainJob", "PyTorchJob")
COMMANDS = (
    *("python3", "polycom", "ssh", "srun", "sbatch", "scontrol", "squeue", "kubectl"),
    *("docker", "podman", "apptainer"),
)
SPEC: dict[str, Any] = {
    "name": "small",
    "trainer": "toy",
    "activation": "polynorm",
    "nodes": 2,
    "environment": {"TOY_SPEC": "a b"},
    "toy": {"steps": 1},
}
KEY = "KEY"
"""In a path, where the string itself is the key."""
IN_SPEC = (
    *(("name",), ("activation",), ("sources",), ("toy", "talk"), ("toy", "note"), ("toy", KEY), (KEY,)),
    *(("environment", "HOSTILE"), ("environment", KEY)),
)
"""Where a string may stand in a spec."""
IN_ANY_SITE = (
    *(("environment", "OF_SITE"), ("environment", KEY), ("preflight", "off", 0), ("preflight", KEY)),
    *((KEY,), ("backend",), ("max_restarts",)),
)
"""But for `setup`, whose lines are for a shell."""
IN_SLURM = (("slurm", "comment"), ("slurm", "account"), ("slurm", KEY))
IN_CONTAINER = tuple(
    ("container", *path)
    for path in (("image",), ("engine",), ("mounts", 0), ("options", 0), ("off", 0), (KEY,))
)
IN_HOSTS = (("hosts", 0), ("hosts", 1), ("ssh_options", 0))
IN_PODS = (
    *(("kubernetes", key) for key in ("namespace", "secret", "shared_memory", "user", "kind", KEY)),
    *(("kubernetes", "volumes", 1), ("kubernetes", "capabilities", 0), ("container", "image")),
    *(("kubernetes", section, key) for section in ("labels", "resources", "pod") for key in ("memory", KEY)),
    *(("kubernetes", "pod", "nodeSelector", key) for key in ("label", KEY)),
)
POD = {"volumes": ["claim:/"], "secret": "keys"}
HOSTS = {"hosts": ["node-0", "node-1"]}
CASES: dict[str, tuple[dict[str, Any], tuple[tuple[Any, ...], ...]]] = {
    "local": ({"backend": "local"}, IN_ANY_SITE),
    "slurm": ({"backend": "slurm"}, IN_SLURM),
    **{
        f"slurm-{engine}": (
            {"backend": "slurm", "container": {"image": "image", "engine": engine}},
            IN_CONTAINER,
        )
        for engine in ("docker", "pyxis", "apptainer")
    },
    "docker": ({"backend": "docker", "container": {"image": "image"}, **HOSTS}, (*IN_CONTAINER, *IN_HOSTS)),
    "ssh": ({"backend": "ssh", **HOSTS}, IN_HOSTS),
    **{
        kind: (
            {"backend": "kubernetes", "container": {"image": "image"}, "kubernetes": {**POD, "kind": kind}},
            IN_PODS,
        )
        for kind in ("TrainJob", "PyTorchJob")
    },
}
"""A site of each way to start a run, and what of it goes into what is rendered there."""


@dataclass
class Place:
    """A folder in which nothing may appear but what a run writes there."""

    folder: Path
    calls: Path
    numbers: Iterator[int] = field(default_factory=count)

    def new(self, text: str) -> Path:
        """A folder of that name, of its own, if there can be one."""
        parent = self.folder / str(next(self.numbers))
        try:
            path = parent / text
            path.mkdir(parents=True)
            return path
        except (OSError, ValueError):
            (parent / "plain").mkdir(parents=True)
            return parent / "plain"

    def called(self) -> list[list[str]]:
        """How the stand-ins were called since this was last asked: name, working directory, arguments."""
        found = []
        for path in sorted(self.calls.iterdir()):
            found.append(path.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1])
            path.unlink()
        return found


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where no command but the shells' own can be reached."""
    commands, calls = tmp_path / "commands", tmp_path / "calls"
    commands.mkdir()
    calls.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(STAND_IN)
        (commands / name).chmod(0o755)
    monkeypatch.syspath_prepend(THIRD_PARTY)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("STAND_INS_TELL", str(calls))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node")
    monkeypatch.setattr(sys, "executable", str(commands / "python3"))
    monkeypatch.setattr(metadata, "entry_points", cache(metadata.entry_points))  # asked a thousand times
    return Place(tmp_path / "runs", calls)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return stand_in(tmp_path, monkeypatch)


def put(mapping: dict[str, Any], path: tuple[Any, ...], text: str) -> dict[str, Any]:
    """The mapping with the text there."""
    changed = copy.deepcopy(mapping)
    at: Any = changed
    for key, following in pairwise(path):
        at = at.setdefault(key, [] if isinstance(following, int) else {})
    if isinstance(at, list):
        at[path[-1] : path[-1] + 1] = [text]
    else:
        at[text if path[-1] == KEY else path[-1]] = "1" if path[-1] == KEY else text
    return changed


def written(folder: Path, name: str, content: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(document.dump(content))  # in quotes where it would be no text
    return path


def planned(folder: Path, spec: dict[str, Any], site: dict[str, Any]) -> plan.Run:
    """The run of these in a folder, which its backend can render."""
    known = sites.load(written(folder, "site", site))
    run = plan.planned(load(written(folder, "spec", spec)), folder / "run", folder, known)
    plan.check(run)
    backends.find(run.site.backend).files(run)
    return run


def allowed(attempt: Callable[[], plan.Run]) -> plan.Run | None:
    """What it gives, if it is not refused."""
    try:
        return attempt()
    except PolycomError:
        return None


def with_all_that_is_allowed(place: Place, case: str, text: str) -> tuple[plan.Run, list[tuple[Any, ...]]]:
    """A run with the text in every field that takes it, and these fields; each other one refuses it."""
    spec, (site, in_site) = SPEC, CASES[case]
    taken: list[tuple[Any, ...]] = []
    plain, folder = place.new("plain"), place.new(text)
    base = planned(plain, spec, site)
    for path in IN_SPEC if case == "local" else ():
        changed = put(spec, path, text)
        if allowed(lambda changed=changed: planned(plain, changed, site)):  # type: ignore[misc]
            spec, taken = changed, [*taken, path]
    for path in in_site:
        changed = put(site, path, text)

        def attempt(changed: dict[str, Any] = changed) -> plan.Run:
            run = replace(base, site=sites.load(written(plain, "site", changed)))
            backends.find(run.site.backend).files(run)
            return run

        if allowed(attempt):
            site, taken = changed, [*taken, path]
    in_all = put(spec, ("environment", "HOSTILE"), text), put(site, ("environment", "OF_SITE"), text)
    for where in (folder, plain):
        for mappings in (in_all, (spec, site)):
            if run := allowed(lambda where=where, mappings=mappings: planned(where, *mappings)):  # type: ignore[misc]
                return run, taken
    raise AssertionError(f"{text!r} is taken by each of {taken}, and not by all of them")


def check(place: Place, case: str, text: str, monkeypatch: pytest.MonkeyPatch, starts: bool = True) -> None:
    """Render, and start, a run with the text everywhere: nothing of it is executed, and nothing is lost."""
    run, taken = with_all_that_is_allowed(place, case, text)
    if not starts:
        return
    directory = run.directory.path
    directory.mkdir(exist_ok=True)
    monkeypatch.chdir(directory.parent)
    assert submit([run], backends.find(run.site.backend), jobs=1) == 0
    for script in sorted({"command.sh", "job.sh"} & {path.name for path in directory.iterdir()}):
        done = subprocess.run(
            [*(["bash"] if script == "job.sh" else []), directory / script, "0", "node:1"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), script
    calls = place.called()
    assert [path for path in place.folder.rglob("canary") if path.is_file()] == []

    again = plan.recorded(directory)
    assert (again.spec, again.site) == (run.spec, run.site)
    nodes = [call for call in calls if call[-2:] == ["node", str(directory)]]
    if case != "TrainJob" and case != "local":
        assert nodes, calls
    words = {word for call in calls for word in call}
    for path in taken:
        if path == ("container", "image") and case not in CASES_OF_PODS:
            assert {text, f"--container-image={text}"} & words, path
            assert not text.startswith("-"), "an engine would take it for an option"
        elif path in (("container", "options", 0), *IN_HOSTS) and case not in CASES_OF_PODS:
            assert text in words, path
    if case in CASES_OF_PODS:
        check_manifest(directory, run, text, taken)


def check_manifest(directory: Path, run: plan.Run, text: str, taken: list[tuple[Any, ...]]) -> None:
    job = list(yaml.safe_load_all((directory / "job.yaml").read_text()))
    for pod in pods(job):
        [container] = pod["containers"]
        command = [expanded(word, {"PET_NODE_RANK": "0"}) for word in container["command"]]
        assert str(directory) in command or str(directory / "job.sh") in command
        if ("container", "image") in taken:
            assert container["image"] == text
        if ("kubernetes", "pod", "nodeSelector", "label") in taken:
            assert pod["nodeSelector"]["label"] == text
    for part in job:
        assert part["metadata"]["annotations"]["polycom/run"] == str(directory)
        if ("kubernetes", "labels", "memory") in taken:
            assert part["metadata"]["labels"]["memory"] == text


@pytest.mark.parametrize("case", CASES)
def test_a_string_that_others_take_for_their_language_is_a_string(
    place: Place, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in SAMPLE:
        check(place, case, text, monkeypatch)


def test_a_refusal_is_one_line_whatever_it_names(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place.new("plain")
    monkeypatch.chdir(folder)
    site = {"backend": "slurm", "slurm": {"a\ntouch canary\x1b[2J": "1"}}
    spec, at = written(folder, "spec", SPEC), written(folder, "site", site)
    assert main(["run", str(spec), "--site", str(at)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert r"slurm.a\ntouch canary\x1b[2J is no long option" in line
