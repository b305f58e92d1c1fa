"""The toy trainer, a package of somebody else's, among the trainers, and an empty folder to run in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main

THIRD_PARTY = Path(__file__).with_name("third_party")


@pytest.fixture
def polycom() -> list[str]:
    """The beginning of a `polycom` command line, for a process of its own."""
    return [sys.executable, "-m", "polycom_ext.cli"]


@pytest.fixture
def toy_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a spec of the toy trainer, with these options, into the current directory; returns its name."""
    register(monkeypatch, tmp_path)

    def write(name: str = "small", processes: int = 1, **options: Any) -> str:
        return write_spec(name, processes, options)

    return write


@pytest.fixture(scope="module")
def finished_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps, made once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch, folder)
        assert main(["run", write_spec("small", 1, {"steps": 2})]) == 0
    return folder / "outputs" / "small"


@pytest.fixture(scope="module")
def without_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As in the demo's environment: Megatron imports it where it is, which takes most of a rank's start."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "transformers.py").write_text("raise ModuleNotFoundError(__name__, name=__name__)\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of two megabytes."""
    return disk_of("2m")


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have this process and those that it starts find the toy trainer, and work in `folder`."""
    monkeypatch.syspath_prepend(THIRD_PARTY)
    monkeypatch.setenv("PYTHONPATH", str(THIRD_PARTY), prepend=os.pathsep)
    monkeypatch.chdir(folder)


def write_spec(name: str, processes: int, options: dict[str, Any]) -> str:
    toy = {key.replace("_", "-"): value for key, value in options.items()}
    spec = {
        "trainer": "toy",
        "activation": "polynorm",
        "processes_per_node": processes,
        "environment": {"TOY_SPEC": "a b"},
        "toy": toy,
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return f"{name}.yaml"
