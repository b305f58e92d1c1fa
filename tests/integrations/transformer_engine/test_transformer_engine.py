"""Our operations in Transformer Engine's real Python, each version in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import download

HERE = Path(__file__).parent
WHEELS = {
    "2.13.0": "cb1ad42df836dbe704f9bd140089d6358d7ebea2eeb36f90d533af4504fe2005",
    "2.17.0": "c274fd74ea2e4caa7132921e1ecfa3847931abbed9f6b8cab61346cdb833bc76",
    "2.20.2": "7dcfad943a1a55b2612db9a0e43697fe98c70f4c42ec391ba3a0f872f6ce2094",
}
"""The first with the extension API, the first with forward-backward fusions, the last; Python only, 1 MB."""


def unpack(version: str, folder: Path) -> Path:
    """The wheel's files, in `folder`; skips the test where it cannot be had."""
    filename = f"transformer_engine-{version}-py3-none-any.whl"
    try:
        wheel = download.from_pypi("transformer-engine", version, filename, WHEELS[version])
    except PolycomError as error:
        if "reachable" not in str(error):
            raise
        pytest.skip(str(error))
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return unpack(request.param, tmp_path)


OTHERS = [pytest.param(version, marks=pytest.mark.full) for version in list(WHEELS)[:-1]]


@pytest.mark.parametrize("sources", [list(WHEELS)[-1], *OTHERS], indirect=True)
def test_claims_hold(sources: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        str(HERE / "claims.py"),
        str(HERE / "claims_layers.py"),
    ]
    environment = os.environ | {"POLYCOM_TE_SOURCES": str(sources)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_without_transformer_engine_the_room_says_what_it_needs() -> None:
    with pytest.raises(PolycomError, match=r"cannot import Transformer Engine 2\.13 or later"):
        importlib.import_module("polycom_ext.integrations.transformer_engine")
