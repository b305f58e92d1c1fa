"""Every script that is rendered passes shellcheck, whoever starts the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.runs import backends
from polycom_ext.runs.rundir import RunDirectory

from .conftest import THIRD_PARTY
from .test_hostile import CASES, SPEC, planned

SETUP = {"setup": ["module load cuda/12.8", "export NCCL_IB_HCA=mlx5"]}
"""Refused where nothing runs outside the container."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a name that scripts have to quote."""
    monkeypatch.syspath_prepend(THIRD_PARTY)
    made = tmp_path / "one's own runs"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def with_setup(case: str) -> dict[str, Any]:
    site, _ = CASES[case]
    return {**site, **({} if case == "slurm-pyxis" or site["backend"] == "kubernetes" else SETUP)}


def test_every_rendered_script_passes_shellcheck(folder: Path) -> None:
    scripts = []
    for case in CASES:
        run = planned(folder, {**SPEC, "environment": {"TOY_SPEC": "a b", "HF_TOKEN": "x"}}, with_setup(case))
        directory = RunDirectory(folder / case)
        files = backends.find(run.site.backend).files(run)
        directory.path.mkdir()
        directory.write(run.spec, run.adapter, run.command, run.site, files)
        scripts += sorted(directory.path.glob("*.sh"))
    assert len({path.name for path in scripts}) == 3
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
