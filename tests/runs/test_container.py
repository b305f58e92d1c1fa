"""How a node's command is wrapped for a container, whatever the run and its site are called."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.cli import main
from polycom_ext.errors import PolycomError
from polycom_ext.runs import plan
from polycom_ext.runs.backends import container, rendering
from polycom_ext.runs.backends.docker import Docker
from polycom_ext.runs.plan import Run
from polycom_ext.runs.site import Container, Site
from polycom_ext.runs.spec import load

COMMAND = ["polycom", "node", "RUN_DIR"]
SECRET = "s3cr3t-value"
HOSTILE = """a b,"c"; $(touch canary) `touch canary` 'd':e\n*$HOME\\"""


@pytest.fixture
def planned(toy_spec: Callable[..., str]) -> Callable[..., Run]:
    """A run in this directory, at a site with these keys."""

    def make(path: str = "outputs/small", name: str = "small", **site: Any) -> Run:
        spec, changes = Path(toy_spec()), [f"name={name}"]
        return plan.planned(load(spec, changes), Path(path).absolute(), Path("outputs"), Site(**site))

    return make


def wrapped(run: Run, engine: str = "docker", **about: tuple[str, ...]) -> list[str]:
    return container.wrap(Container("an/image@sha256:0", engine, **about), run, COMMAND)


def received(words: list[str], rank: str = "1") -> list[str]:
    """What the engine gets from the shell that runs the rendered line."""
    line = rendering.shell(["printf", r"%s\0", *words])
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "POLYCOM_NODE_RANK": rank}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def after(option: str, words: list[str]) -> list[str]:
    return [words[n + 1] for n, word in enumerate(words) if word == option]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_what_a_gpu_node_needs_is_there_until_it_is_switched_off(
    planned: Callable[..., Run], engine: str
) -> None:
    run, needed = planned(), container.DEFAULTS[engine]
    whole = " ".join(wrapped(run, engine))
    assert whole.startswith(f"{engine} run ")
    for name in needed:
        without = " ".join(wrapped(run, engine, off=(name,)))
        for other, words in needed.items():
            assert " ".join(words) in whole
            assert (" ".join(words) in without) == (other != name)


@pytest.mark.parametrize(
    ("engine", "off", "has"), [("docker", (), 1), ("podman", (), 0), ("podman", ("pid",), 1)]
)
def test_orphans_are_buried_by_an_init_where_the_engine_takes_one(
    planned: Callable[..., Run], engine: str, off: tuple[str, ...], has: int
) -> None:
    assert wrapped(planned(), engine, off=off).count("--init") == has


def test_a_name_that_switches_nothing_off_is_refused(planned: Callable[..., Run]) -> None:
    with pytest.raises(PolycomError, match=r"container\.off has no 'gpu' \(did you mean 'gpus'\?\)"):
        wrapped(planned(), off=("gpu",))


def test_an_engine_that_is_no_command_is_refused(planned: Callable[..., Run]) -> None:
    with pytest.raises(PolycomError, match=r"pyxis is no command .* docker, podman, apptainer"):
        wrapped(planned(), "pyxis")


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_a_secret_is_passed_by_its_name_alone(planned: Callable[..., Run], engine: str) -> None:
    run = planned(environment={"HF_TOKEN": SECRET, "NCCL_IB_HCA": "mlx5"})
    words = wrapped(run, engine)
    assert {"HF_TOKEN", "POLYCOM_NODE_RANK", "POLYCOM_RENDEZVOUS"} <= set(after("--env", words))
    assert not any(SECRET in word for word in words)


@pytest.mark.parametrize("engine", ["docker", "podman", "apptainer"])
def test_hostile_paths_and_names_reach_the_engine_as_they_are_and_run_nothing(
    planned: Callable[..., Run], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    run = planned(str(folder / "run"))
    monkeypatch.chdir(folder)
    words = received(wrapped(run, engine, mounts=(f"/{HOSTILE}",), options=(HOSTILE,)))
    assert list(tmp_path.rglob("canary")) == []
    assert words[-4:] == ["an/image@sha256:0", *COMMAND]
    assert HOSTILE in words
    mounted = [
        next(csv.reader([mount])) if "\n" not in mount else parsed(mount) for mount in after("--mount", words)
    ]
    assert [fields[1] for fields in mounted] == [f"source={folder}", f"source={folder / 'run'}"]
    assert [fields[2].partition("=")[2] for fields in mounted] == [str(folder), str(folder / "run")]
    assert str(folder) in words


def parsed(mount: str) -> list[str]:
    return next(csv.reader(mount.splitlines(keepends=True)))


def test_each_node_of_each_run_has_a_name_of_its_own_that_docker_takes(planned: Callable[..., Run]) -> None:
    run, other = planned("one", name="größe+small"), planned("another", name="größe+small")
    names = [after("--name", received(wrapped(run), rank))[0] for rank in "01"]
    assert names == [container.named(run, 0), container.named(run, 1)]
    assert len({*names, container.named(other, 0), container.named(other, 1)}) == 4
    assert all(re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name) for name in names)
    assert "small" in names[0]


def test_a_user_keeps_the_number_that_owns_the_files(planned: Callable[..., Run]) -> None:
    assert after("--user", wrapped(planned())) == [f"{os.getuid()}:{os.getgid()}"]


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        (
            {},
            "the backend docker wants a site whose `container:` has an image, and docker or podman as engine",
        ),
        ({"container": Container("an/image", "apptainer")}, "wants a site whose `container:` has an image"),
        ({"container": Container("an/image"), "hosts": ("localhost",)}, "nodes is 2, and the site's `hosts`"),
        (
            {"container": Container("an/image"), "hosts": ("localhost", "gpu-02")},
            "others of the site's `hosts` are to reach the first one, and have no name for it but localhost",
        ),
    ],
)
def test_the_backend_docker_refuses_what_it_could_not_start(
    toy_spec: Callable[..., str], site: dict[str, Any], sentence: str
) -> None:
    run = plan.planned(load(Path(toy_spec()), ["nodes=2"]), Path("outputs").absolute(), Path(), Site(**site))
    with pytest.raises(PolycomError, match=re.escape(sentence)):
        Docker().files(run)


def test_a_dry_run_shows_each_nodes_container_and_no_secret(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("site.yaml").write_text(f"extends: docker-rehearsal.yaml\nenvironment: {{HF_TOKEN: {SECRET}}}\n")
    assert main(["run", toy_spec(steps=1), "--nodes", "2", "--site", "site.yaml", "--dry-run"]) == 0
    shown = capfd.readouterr().out
    [line] = [line for line in shown.splitlines() if "exec docker run" in line]
    assert f"--env HF_TOKEN polycom:cpu polycom node {Path('outputs/small').absolute()}" in line
    assert SECRET not in shown
    assert "--gpus" not in line
