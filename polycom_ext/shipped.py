"""The folders at the top of the repository that travel with the package: patches, configs, launch, docker.

In a checkout they lie beside the package; a wheel carries them inside it (setup.py copies them in).
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "patches" / "pins.toml").is_file() else None
"""The checkout that the package is imported from; None for an installed wheel."""
FOLDERS = ("patches", "configs", "launch", "docker")


def folder(name: str) -> Path:
    """Where one of FOLDERS is."""
    return (CHECKOUT or _PACKAGE) / name


def find(path: Path) -> Path:
    """The path itself if it is there; else the shipped file of that name, as in `configs/tiny/….yaml`."""
    if path.exists() or path.is_absolute() or path.parts[:1] not in [(name,) for name in FOLDERS]:
        return path
    ours = folder(path.parts[0]).joinpath(*path.parts[1:])
    return ours if ours.is_file() else path
