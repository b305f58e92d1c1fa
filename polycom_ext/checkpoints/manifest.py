"""conversion.json: what a converted checkpoint was made of, and the hash of each of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polycom_ext._version import __version__
from polycom_ext.data.progress import progress
from polycom_ext.errors import PolycomError
from polycom_ext.files import sha256

NAME = "conversion.json"
FOR_PEOPLE = (".json", ".jinja", ".txt", ".py", ".yaml", ".md")
"""Ends of the names of files that somebody may have changed on purpose: settings, a tokenizer, a page."""


def write(folder: Path, source: str) -> None:
    """Note every file of a folder that is whole."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): sha256(path) for path in paths}
    told = {"source": source, "polycom-ext": __version__, "sha256": files}
    (folder / NAME).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def compare(folder: Path) -> None:
    """Hold the weights of a folder to its conversion.json, where it has one: safetensors has no checksum.

    Raises:
        PolycomError: a file is not there, or not as it was written; or conversion.json cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return
    files = _noted(path)
    sizes = {}
    for name in files:
        try:
            sizes[name] = (folder / name).stat().st_size
        except OSError as error:
            raise _differs(folder / name, error.strerror or str(error)) from None
    with progress(sum(sizes.values()), f"comparing {folder.name}") as bar:
        for name, digest in files.items():
            if sha256(folder / name, bar.update) != digest:
                raise _differs(folder / name, "other bytes")


def _noted(path: Path) -> dict[str, str]:
    """The files of weights, by their names in the folder."""
    try:
        told: Any = json.loads(path.read_bytes())["sha256"]
        return {name: str(told[name]) for name in told if not name.endswith(FOR_PEOPLE)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PolycomError(
            f"{path} cannot be read as `polycom convert` writes it; remove it to go on"
        ) from None


def _differs(path: Path, how: str) -> PolycomError:
    return PolycomError(
        f"{path} is not what was converted ({how}): copy or convert it again, or remove {NAME} to read it "
        "as it is"
    )
