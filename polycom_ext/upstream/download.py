"""Files from PyPI, checked by hash before anybody opens them, and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from polycom_ext.errors import PolycomError


def cache_dir() -> Path:
    """$POLYCOM_CACHE, or ~/.cache/polycom."""
    return Path(os.environ.get("POLYCOM_CACHE") or Path.home() / ".cache" / "polycom")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def from_pypi(project: str, version: str, filename: str, sha256: str, cache: Path | None = None) -> Path:
    """Download one file of a release with pip, unless the cache has it.

    Args:
        project, version: as on PyPI.
        filename: of the wheel (.whl) or the source archive wanted.
        sha256: hexadecimal; a file that has another is refused and not kept.
        cache: folder to keep it in; `cache_dir()` unless given.

    Returns the file's path. Raises PolycomError when it cannot be had or its hash differs.
    """
    folder = (cache or cache_dir()) / "pypi"
    kept = folder / filename
    if kept.exists():
        _check(kept, sha256)
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--ignore-requires-python",
        ]
        command += [
            "--require-hashes",
            "--dest",
            scratch,
            "--requirement",
            str(requirement),
            *_form(filename),
        ]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        arrived = Path(scratch) / filename
        if not arrived.exists():
            said = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
            raise PolycomError(
                f"cannot download {filename}: {said[-1] if said else 'pip brought another file'}"
            )
        _check(arrived, sha256)
        arrived.replace(kept)
    return kept


def _form(filename: str) -> list[str]:
    """pip's options that make it choose this very file."""
    if not filename.endswith(".whl"):
        return ["--no-binary", ":all:"]
    python, abi, platforms = filename.removesuffix(".whl").split("-")[-3:]
    options = ["--only-binary", ":all:"]
    if platforms != "any":
        options += ["--implementation", "cp", "--python-version", python.removeprefix("cp"), "--abi", abi]
        for platform in platforms.split("."):
            options += ["--platform", platform]
    return options


def _check(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise PolycomError(
            f"{path} has sha256 {found}, but {expected} is pinned: delete it if you do not trust it"
        )
