"""Unpack wheels and source archives of which nothing but the hash is trusted."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from polycom_ext.errors import PolycomError


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str
    """file, folder, or link or device."""
    executable: bool
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, zip or tar archive into a folder.

    Raises PolycomError, before it writes anything, for members that would leave the folder (absolute names,
    `..`), links and devices, two members of one name, parts of a git repository, and for what is no archive.
    """
    with _members(archive) as members:
        names: set[PurePosixPath] = set()
        for member in members:
            path = PurePosixPath(member.name)
            why = _objection(member, path) or ("which is there twice" if path in names else None)
            if why:
                raise PolycomError(f"{archive.name} holds {member.name!r}, {why}")
            if member.kind == "file":
                names.add(path)
        folder.mkdir(parents=True, exist_ok=True)
        for member in members:
            target = folder / member.name
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("xb") as file:  # type: ignore[union-attr]
                shutil.copyfileobj(source, file)
            target.chmod(0o755 if member.executable else 0o644)


def _objection(member: _Member, path: PurePosixPath) -> str | None:
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name.split("/")[0]:
        return "which would leave its folder"
    if member.kind not in ("file", "folder"):
        return f"a {member.kind}, which may lead out of its folder"
    if any(part.lower() == ".git" for part in path.parts):
        return "part of a git repository"
    return None


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                yield [_from_zip(zipped, info) for info in zipped.infolist()]
        else:
            with tarfile.open(archive) as tarred:
                yield [_from_tar(tarred, info) for info in tarred.getmembers()]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise PolycomError(f"{archive} cannot be unpacked: {error}") from error


def _from_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    mode = info.external_attr >> 16
    strange = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
    kind = "link or device" if strange else "folder" if info.is_dir() else "file"
    return _Member(info.filename, kind, bool(mode & stat.S_IXUSR), lambda: archive.open(info))


def _from_tar(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    kind = "file" if info.isfile() else "folder" if info.isdir() else "link or device"
    return _Member(info.name, kind, bool(info.mode & stat.S_IXUSR), lambda: archive.extractfile(info))
