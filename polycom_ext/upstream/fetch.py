"""Make an upstream's tree: download, verify, unpack, and commit as it is."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import download, git
from polycom_ext.upstream.pins import Git, Pin, Wheel, patches_dir

IGNORED = ("__pycache__/", "*.py[co]", "*.so", ".polycom-*")
"""Files that appear in a tree by using it; compiled files that upstream ships are committed all the same."""


def trees_dir() -> Path:
    """Where the trees are: $POLYCOM_UPSTREAM_DIR, or `.upstream` beside `patches/`."""
    return Path(os.environ.get("POLYCOM_UPSTREAM_DIR") or patches_dir().parent / ".upstream")


def fetch(pin: Pin) -> Path:
    """Make the tree unless it is there; a git repository whose first commit is upstream as it was.

    Raises PolycomError when the source cannot be had or is not what is pinned, and when a tree of another
    version is in the way; then nothing is changed.
    """
    tree = trees_dir() / pin.name
    if tree.exists():
        if not (tree / ".git").exists() or first_message(tree) != _message(pin):
            raise PolycomError(f"{tree} is not {pin.name} {pin.version}: move it away, then fetch again")
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=f".{pin.name}.") as scratch:
        made = Path(scratch) / pin.name
        build(pin, made)
        made.rename(tree)
    return tree


def first_message(tree: Path) -> str:
    """The message of a tree's first commit; empty where there is none."""
    found = git.run(tree, "log", "--max-parents=0", "--format=%B", check=False)
    return found.stdout.strip()


def build(pin: Pin, folder: Path) -> None:
    """Unpack the pinned source into a new folder and commit it."""
    folder.mkdir()
    if isinstance(pin.source, Wheel):
        name = pin.source.choose()
        archive = download.from_pypi(pin.source.project, pin.version, name, pin.source.files[name])
        unpack(archive, folder)
    else:
        _export(pin.source, folder)
    git.run(folder, "init", "--quiet", "--initial-branch", "polycom")
    information = folder / ".git" / "info"
    information.mkdir(exist_ok=True)
    (information / "exclude").write_text("\n".join(IGNORED) + "\n")
    (information / "attributes").write_text("* -text -filter\n")
    git.run(folder, "add", "--all", "--force")
    git.run(
        folder, "commit", "--quiet", "--message", _message(pin), environment={"GIT_AUTHOR_DATE": git.EPOCH}
    )


def _message(pin: Pin) -> str:
    if isinstance(pin.source, Wheel):
        name = pin.source.choose()
        source = f"{name}\nsha256 {pin.source.files[name]}"
    else:
        source = f"{pin.source.url}\ncommit {pin.source.commit}\npaths {' '.join(pin.source.paths)}"
    return f"{pin.name} {pin.version} as it was\n\n{source}"


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel. Refuses, before it writes anything, members that would leave the folder and links."""
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            path = PurePosixPath(member.filename)
            leaves = (
                path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in path.parts[0]
            )
            if leaves or stat.S_ISLNK(member.external_attr >> 16):
                raise PolycomError(f"{archive.name} holds {member.filename!r}, which would leave its folder")
            if path.parts[0] == ".git":
                raise PolycomError(f"{archive.name} holds {member.filename!r}, part of a git repository")
        wheel.extractall(folder)


def _export(source: Git, folder: Path) -> None:
    """Check out the wanted paths of a commit, from a clone in the cache that lacks all other files."""
    clone = download.cache_dir() / "git" / hashlib.sha256(repr(source).encode()).hexdigest()[:16]
    wanted = ("checkout", "--quiet", source.commit, "--", *source.paths)
    if not clone.exists():
        clone.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=clone.parent) as scratch:
            made = Path(scratch) / "clone"
            made.mkdir()
            git.run(made, "init", "--quiet", "--bare")
            git.run(made, "remote", "add", "origin", source.url)
            git.run(made, "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", source.commit)
            _checkout(made, wanted)
            made.rename(clone)
    _checkout(clone, wanted, folder)


def _checkout(clone: Path, wanted: tuple[str, ...], folder: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch) / "tree"
        place.mkdir(exist_ok=True)
        index = str(Path(scratch) / "index")
        git.run(clone, "--work-tree", str(place), *wanted, environment={"GIT_INDEX_FILE": index})
