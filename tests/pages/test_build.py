"""`make docs`: builds without a warning, holds what is public, and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import polycom_ext
from polycom_ext.runs.adapter import Adapter

from .conftest import TOP

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the Makefile's own command, into another folder."""
    folder = tmp_path_factory.mktemp("docs")
    said = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.ready", "docs"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    _, *options, _ = shlex.split(said.splitlines()[-1])
    command = [sys.executable, *options, str(folder)]
    told = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    return folder


def test_everything_public_is_described(built: Path) -> None:
    described = InventoryFile.loads((built / "objects.inv").read_bytes(), uri="").data
    objects = {
        name.rpartition(".")[2] for kind, names in described.items() if "py:" in kind for name in names
    }
    assert set(polycom_ext.__all__) <= objects
    assert {name for name in vars(Adapter) if not name.startswith("_")} <= objects


def test_a_page_loads_nothing_from_elsewhere(built: Path) -> None:
    pages = [Path(folder) / name for folder, _, names in os.walk(built) for name in names]
    for page in (page for page in pages if page.suffix in (".html", ".css")):
        text = page.read_text()
        assert not re.search(r"""<(script|img|link|iframe)[^>]*(src|href)="(https?:)?//""", text), page
        assert not re.search(r"""(@import|url\()\s*["']?(https?:)?//""", text), page
