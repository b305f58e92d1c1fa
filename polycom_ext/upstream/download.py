"""Files from PyPI, checked by hash before anybody opens them, and kept."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from polycom_ext import files
from polycom_ext.errors import PolycomError


def cache_dir() -> Path:
    """$POLYCOM_CACHE, or ~/.cache/polycom; for a user without a home that can be written, a temporary folder.

    Raises PolycomError when that temporary folder belongs to somebody else.
    """
    named = os.environ.get("POLYCOM_CACHE")
    if named:
        return Path(named).absolute()
    with contextlib.suppress(RuntimeError):  # of a user id without an entry in passwd, and no $HOME
        home = Path.home().absolute()
        # The temporary folder is everybody's, also where it stands in for a home.
        if home != Path(tempfile.gettempdir()) and _may_write(home / ".cache" / "polycom"):
            return home / ".cache" / "polycom"
    return _temporary_cache()


def make_folder(folder: Path) -> Path:
    """Make a folder of the cache, and return it. Raises PolycomError, with the way out, where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return folder


def _unusable(folder: Path, error: OSError) -> PolycomError:
    return PolycomError(
        f"cannot write {folder}: {error.strerror}; set POLYCOM_CACHE to a folder that can be written, "
        "where downloads are kept"
    )


def _may_write(folder: Path) -> bool:
    """Whether a folder can be written, or else made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.R_OK | os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"polycom-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise _unusable(folder, OSError(errno.EEXIST, "it is somebody else's"))
    return folder


def say(message: str) -> None:
    """Tell a person, on stderr, what is being done and may take a while."""
    print(message, file=sys.stderr, flush=True)


def from_pypi(project: str, version: str, filename: str, sha256: str, cache: Path | None = None) -> Path:
    """Download one file of a release with pip, unless the cache has it.

    pip is given the hash, so that it builds nothing of a source archive before it has compared it.

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
        found = files.sha256(kept)
        if found != sha256:
            raise PolycomError(
                f"{kept} has sha256 {found}, but {sha256} is pinned: delete it to download it again"
            )
        return kept
    make_folder(folder)
    say(f"downloading {filename}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
        command += ["--disable-pip-version-check", "--no-input", "--require-hashes", "--dest", scratch]
        command += ["--requirement", str(requirement), *_which(project, filename)]
        # pip's progress bar is for a person at a terminal; its complaints are ours to put into one sentence.
        show = 2 if sys.stderr.isatty() else subprocess.DEVNULL
        finished = subprocess.run(command, stdout=show, stderr=subprocess.PIPE, text=True, check=False)
        arrived = Path(scratch) / filename
        if not arrived.exists():
            raise PolycomError(f"cannot download {filename} of {project} {version}: {_why(finished.stderr)}")
        found = files.sha256(arrived)
        if found != sha256:
            raise PolycomError(
                f"PyPI's {filename} has sha256 {found}, but {sha256} is pinned: it was not kept"
            )
        arrived.replace(kept)
    return kept


def _which(project: str, filename: str) -> list[str]:
    """pip's options that make it choose this very file, whatever Python and machine it runs on."""
    if not filename.endswith(".whl"):
        return ["--no-binary", project]
    python, abi, platforms = filename.removesuffix(".whl").split("-")[-3:]
    tag = python.split(".")[-1]
    options = [
        "--only-binary",
        ":all:",
        "--implementation",
        tag[:2],
        "--python-version",
        tag[2:],
        "--abi",
        abi,
    ]
    for platform in platforms.split("."):
        options += ["--platform", platform]
    return options


def _why(complaints: str) -> str:
    """pip's complaint as half a sentence."""
    if "DO NOT MATCH THE HASHES" in complaints:
        return "PyPI's file has another sha256 than the one that is pinned; it was not kept"
    errors = [line.removeprefix("ERROR: ") for line in complaints.splitlines() if line.startswith("ERROR: ")]
    if errors:
        return f"{errors[-1].rstrip('.')} (is PyPI reachable from here?)"
    said = complaints.strip().splitlines()
    return said[-1] if said else "pip brought another file"
