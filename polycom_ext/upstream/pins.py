"""patches/pins.toml: which version of each upstream the patches are for, and where it comes from."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext.errors import PolycomError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Wheel:
    """A project on PyPI and the files of one version of it: name -> sha256."""

    project: str
    files: dict[str, str]

    def choose(self) -> str:
        """The file for this interpreter and machine, or the nearest in version where only the sources matter.

        Raises PolycomError when no file is for this machine at all.
        """
        machine = platform.machine()
        fitting = [name for name in self.files if name.endswith("any.whl") or f"_{machine}.whl" in name]
        if not fitting:
            raise PolycomError(f"no wheel of {self.project} is pinned for {machine}")

        def distance(name: str) -> int:
            tag = re.search(r"-cp3(\d+)-", name)
            return abs(int(tag[1]) - sys.version_info.minor) if tag else 0

        return min(fitting, key=distance)


@dataclass(frozen=True)
class Git:
    """A commit of a git repository and the paths wanted from it."""

    url: str
    commit: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Pin:
    """One upstream."""

    name: str
    version: str
    origin: str
    source: Wheel | Git
    series: Path | None
    """Folder of the patch series; None for an upstream that is taken as it is."""


def patches_dir() -> Path:
    """`patches/` of the checkout that this package is installed from, or $POLYCOM_PATCHES."""
    folder = Path(os.environ.get("POLYCOM_PATCHES") or Path(__file__).parents[2] / "patches")
    if not (folder / "pins.toml").is_file():
        raise PolycomError(
            f"no pins.toml in {folder}: run from a checkout, or set POLYCOM_PATCHES to its patches/"
        )
    return folder


def load() -> dict[str, Pin]:
    """All pins by name. Raises PolycomError for a file that is not as this module expects it."""
    folder = patches_dir()
    path = folder / "pins.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolycomError(f"{path} is not valid TOML: {error}") from error
    return {name: _pin(path, name, table) for name, table in tables.items()}


def get(name: str) -> Pin:
    """One pin. Raises PolycomError for an unknown name."""
    pins = load()
    if name not in pins:
        raise PolycomError(f"unknown upstream {name!r}; known: {', '.join(pins)}")
    return pins[name]


def _pin(path: Path, name: str, table: Any) -> Pin:
    def fail(why: str) -> PolycomError:
        return PolycomError(f"{path}: [{name}] {why}")

    if not isinstance(table, dict):
        raise fail("must be a table")
    unknown = set(table) - {"version", "series", "origin", "wheel", "git"}
    if unknown:
        raise fail(f"has unknown keys: {', '.join(sorted(unknown))}")
    if ("wheel" in table) == ("git" in table):
        raise fail("needs exactly one source, `wheel` or `git`")
    source: Wheel | Git
    try:
        if "wheel" in table:
            source = Wheel(**table["wheel"])
            if not all(re.fullmatch("[0-9a-f]{64}", sha) for sha in source.files.values()):
                raise fail("has a wheel whose sha256 is not 64 hexadecimal digits")
        else:
            source = Git(**{**table["git"], "paths": tuple(table["git"]["paths"])})
            if not re.fullmatch("[0-9a-f]{40}", source.commit):
                raise fail("needs a whole commit id, 40 hexadecimal digits")
        series = path.parent / table["series"] if "series" in table else None
        return Pin(name, table["version"], table["origin"], source, series)
    except (KeyError, TypeError) as error:
        raise fail(f"is not complete: {error}") from error
