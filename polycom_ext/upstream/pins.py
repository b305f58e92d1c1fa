"""patches/pins.toml: which version of each upstream the patches are for, and where it comes from.

[NAME]
version = "0.17.1"
series = "NAME"                 # folder of the patch series beside pins.toml; without it: taken as it is
origin = "for a person: where the version is published"

[NAME.pypi]                     # a release on PyPI: wheels, or a source archive
project = "megatron-core"
files."FILENAME" = "sha256"

[NAME.git]                      # or a commit, of which only these paths are taken
url = "https://…"
commit = "40 hexadecimal digits"
paths = ["olmo", "scripts"]
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polycom_ext import shipped
from polycom_ext.errors import PolycomError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Release:
    """A project on PyPI and the files of one version of it: name -> sha256."""

    project: str
    files: dict[str, str]

    def choose(self) -> str:
        """The file for this interpreter and machine.

        Where the machine has wheels for other versions of Python only, the one nearest in version: its Python
        sources are the same, and what upstream compiled does not load. Raises PolycomError when no file is
        for this machine at all.
        """
        machine = platform.machine()
        fitting = [
            name for name in self.files if not name.endswith(".whl") or _platform(name) in ("any", machine)
        ]
        if not fitting:
            raise PolycomError(f"no wheel of {self.project} is pinned for {machine}")

        def distance(name: str) -> int:
            tag = re.search(r"-cp3(\d+)-", name)
            return abs(int(tag[1]) - sys.version_info[1]) if tag else 0

        return min(fitting, key=distance)


def _platform(wheel: str) -> str:
    """`any`, or the machine of a wheel's platform tag, as `platform.machine()` has it."""
    tag = wheel.removesuffix(".whl").rpartition("-")[2].split(".")[-1]
    return re.sub(r"^(manylinux|musllinux|macosx)_\d+_\d+_|^(linux|win)_", "", tag)


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
    source: Release | Git
    series: Path | None
    """Folder of the patch series; None for an upstream that is taken as it is."""

    @property
    def described(self) -> str:
        """Where the content comes from, for a person."""
        if isinstance(self.source, Git):
            return f"{self.source.url} at {self.source.commit[:10]}"
        return f"PyPI {self.source.project} {self.version}"


def patches_dir() -> Path:
    """The `patches/` that came with this package, or $POLYCOM_PATCHES."""
    folder = Path(os.environ.get("POLYCOM_PATCHES") or shipped.folder("patches")).absolute()
    if not (folder / "pins.toml").is_file():
        raise PolycomError(f"no pins.toml in {folder}: set POLYCOM_PATCHES to a folder of patches")
    return folder


def trees_dir() -> Path:
    """Where the trees are: $POLYCOM_UPSTREAM_DIR, or `.upstream` beside `patches/`.

    An installed wheel keeps them in $XDG_DATA_HOME/polycom (default: ~/.local/share/polycom).
    """
    if given := os.environ.get("POLYCOM_UPSTREAM_DIR"):
        return Path(given).absolute()
    if shipped.CHECKOUT is None and not os.environ.get("POLYCOM_PATCHES"):
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return Path(data).absolute() / "polycom" / "upstream"
    return patches_dir().parent / ".upstream"


def load() -> dict[str, Pin]:
    """All pins by name. Raises PolycomError for a file that is not as this module expects it."""
    path = patches_dir() / "pins.toml"
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
    where = f"{path}: [{name}]"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise PolycomError(f"{where} is no name for a folder: use letters, digits and dashes")
    _check_keys(where, table, {"version": str, "origin": str}, {"series": str, "pypi": dict, "git": dict})
    if ("pypi" in table) == ("git" in table):
        raise PolycomError(f"{where} needs exactly one source, `pypi` or `git`")
    series = path.parent / table["series"] if "series" in table else None
    source = _release(where, table["pypi"]) if "pypi" in table else _git(where, table["git"])
    return Pin(name, table["version"], table["origin"], source, series)


def _release(where: str, table: dict[str, Any]) -> Release:
    _check_keys(f"{where} pypi", table, {"project": str, "files": dict})
    for file, sha256 in table["files"].items():
        if not re.fullmatch("[0-9a-f]{64}", str(sha256)):
            raise PolycomError(f"{where} the sha256 of {file} must be 64 hexadecimal digits")
    return Release(**table)


def _git(where: str, table: dict[str, Any]) -> Git:
    _check_keys(f"{where} git", table, {"url": str, "commit": str, "paths": list})
    if not re.fullmatch("[0-9a-f]{40}", table["commit"]):
        raise PolycomError(f"{where} needs a whole commit id, 40 hexadecimal digits")
    if not table["paths"]:
        raise PolycomError(f"{where} needs the paths that are wanted")
    return Git(table["url"], table["commit"], tuple(table["paths"]))


def _check_keys(
    where: str, table: Any, needed: dict[str, type], optional: dict[str, type] | None = None
) -> None:
    known = {**needed, **(optional or {})}
    if not isinstance(table, dict):
        raise PolycomError(f"{where} must be a table")
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise PolycomError(f"{where} has unknown keys: {', '.join(unknown)}; known: {', '.join(known)}")
    missing = [key for key in needed if key not in table]
    if missing:
        raise PolycomError(f"{where} lacks {', '.join(missing)}")
    for key, value in table.items():
        if not isinstance(value, known[key]):
            raise PolycomError(f"{where} {key} must be a {known[key].__name__}, not {value!r}")
