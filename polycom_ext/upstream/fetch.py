"""Make an upstream's tree: download, verify, unpack, and commit as it is."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.files import lock
from polycom_ext.upstream import download, git
from polycom_ext.upstream.archive import unpack
from polycom_ext.upstream.download import say
from polycom_ext.upstream.pins import Git, Pin, Release, trees_dir


@contextmanager
def locked(pin: Pin) -> Iterator[int]:
    """One process at a time changes an upstream's tree; yields the lock's descriptor."""
    path = trees_dir() / f".{pin.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    except OSError as error:
        raise PolycomError(f"cannot write {path}: {error.strerror}") from error
    with file:
        if not lock(file):
            say(f"{pin.name}: waiting for another process that changes its tree")
            lock(file, wait=True)
        yield file.fileno()


def fetch(pin: Pin) -> Path:
    """Make the tree unless it is there; a git repository whose first commit is upstream as it was.

    Raises PolycomError when the source cannot be had or is not what is pinned, and when something else is in
    the way; then nothing is changed.
    """
    tree = trees_dir() / pin.name
    if _is_made(pin, tree):
        return tree
    with locked(pin):
        if _is_made(pin, tree):
            return tree
        prefix = f".{pin.name}.scratch-"
        for left in tree.parent.glob(f"{prefix}*"):  # by a fetch that was killed: nobody else holds the lock
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=tree.parent, prefix=prefix) as scratch:
            made = Path(scratch) / pin.name
            build(pin, made)
            made.rename(tree)
    return tree


def _is_made(pin: Pin, tree: Path) -> bool:
    if not tree.exists():
        return False
    if not (tree / ".git").exists():
        raise PolycomError(f"{tree} is in the way: it was not made by `polycom upstream fetch`; move it away")
    message = first_message(tree)
    if message == _message(pin, _chosen(pin)):
        return True
    if is_of(pin, message):
        raise PolycomError(
            f"{tree} was made for another version of Python or another machine: remove it, then fetch again"
        )
    raise PolycomError(
        f"{tree} is not {pin.name} {pin.version} as it is pinned: move it away, then fetch again"
    )


def first_message(tree: Path) -> str:
    """The message of a tree's first commit; empty where there is none."""
    return git.run(tree, "log", "--max-parents=0", "--format=%B", check=False).stdout.strip()


def is_of(pin: Pin, message: str) -> bool:
    """Whether a tree whose first commit has this message was made from the pin, on whatever machine."""
    files = pin.source.files if isinstance(pin.source, Release) else [None]
    return any(message == _message(pin, file) for file in files)


def _message(pin: Pin, file: str | None) -> str:
    if isinstance(pin.source, Release):
        assert file is not None
        source = f"{file}\nsha256 {pin.source.files[file]}"
    else:
        source = f"{pin.source.url}\ncommit {pin.source.commit}\npaths {' '.join(pin.source.paths)}"
    return f"{pin.name} {pin.version} as it was\n\n{source}"


def _chosen(pin: Pin) -> str | None:
    return pin.source.choose() if isinstance(pin.source, Release) else None


def build(pin: Pin, folder: Path) -> None:
    """Put the pinned source, verified, into a new folder and commit it there."""
    if isinstance(pin.source, Release):
        name = pin.source.choose()
        file = download.from_pypi(pin.source.project, pin.version, name, pin.source.files[name])
        say(f"{pin.name}: unpacking")
        _unpack_release(file, folder)
    else:
        clone = _clone(pin.name, pin.source)
        say(f"{pin.name}: unpacking")
        _export(pin.source, clone, folder)
    git.run(folder, "init", "--quiet", "--template=", "--initial-branch", "polycom")
    information = folder / ".git" / "info"
    information.mkdir(exist_ok=True)
    # For the user's own git; here, git goes by these two whatever becomes of the files.
    (information / "attributes").write_text(git.KEEP_BYTES)
    (information / "exclude").write_text("\n".join(git.IGNORED) + "\n")
    git.run(folder, "config", "core.autocrlf", "false")
    git.run(folder, "add", "--all", "--force")
    if isinstance(pin.source, Git):
        _compare(pin, pin.source, clone, folder)
    message = _message(pin, _chosen(pin))
    git.run(folder, "commit", "--quiet", "--no-gpg-sign", "--message", message)


def _unpack_release(file: Path, folder: Path) -> None:
    """Unpack a wheel, or a source archive without the one folder that holds all of it."""
    if file.suffix == ".whl":
        unpack(file, folder)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpack(file, Path(scratch))
        tops = list(Path(scratch).iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise PolycomError(f"{file.name} is no source archive of a release: it should hold one folder")
        tops[0].rename(folder)


def _clone(name: str, source: Git) -> Path:
    """A bare repository in the cache with the pinned commit and, of its files, only the wanted ones."""
    key = hashlib.sha256(repr(source).encode()).hexdigest()[:8]
    clone = download.cache_dir() / "git" / f"{name}-{source.commit[:10]}-{key}"
    if clone.exists():
        return clone
    download.make_folder(clone.parent)
    say(f"{name}: fetching {', '.join(source.paths)} of {source.url} at {source.commit[:10]}")
    with tempfile.TemporaryDirectory(dir=clone.parent) as scratch:
        made = Path(scratch) / "clone"
        made.mkdir()
        git.run(made, "init", "--quiet", "--bare", "--template=")
        git.run(made, "remote", "add", "origin", source.url)
        _receive(made, source, "--depth", "1", source.commit)
        # All wanted files in one request; a checkout would ask for them one by one.
        blobs = sorted({blob for _, blob, _ in _files(made, source)})
        _receive(made, source, "--no-write-fetch-head", "--stdin", stdin="\n".join(blobs))
        try:
            made.rename(clone)
        except OSError:
            if not clone.exists():  # otherwise another checkout with the same cache was quicker
                raise
    return clone


def _receive(clone: Path, source: Git, *arguments: str, stdin: str = "") -> None:
    what = ("fetch", "--quiet", "--no-tags", "--filter=blob:none", "origin", *arguments)
    finished = git.run(clone, *what, stdin=stdin, check=False, users_network=True)
    if finished.returncode != 0:
        raise PolycomError(
            f"cannot fetch {source.commit[:10]} of {source.url}: {git.last_words(finished)} "
            "(a git mirror can be named by `git config --global url.MIRROR.insteadOf URL`)"
        )


def _files(clone: Path, source: Git) -> list[tuple[str, str, str]]:
    """(mode, blob id, path) of every wanted file; PolycomError for links and for paths that are not there."""
    listing = git.output(clone, "ls-tree", "-r", "-z", source.commit, "--", *source.paths)
    files = []
    for entry in listing.rstrip("\0").split("\0"):
        about, _, path = entry.partition("\t")
        mode, _, blob = about.split() if about else ("", "", "")
        files.append((mode, blob, path))
    for mode, _, path in files:
        if mode not in ("100644", "100755"):
            raise PolycomError(
                f"{source.url} holds {path!r}, a link or submodule, which may lead out of its folder"
            )
    for wanted in source.paths:
        if not any(path == wanted or path.startswith(f"{wanted}/") for _, _, path in files):
            raise PolycomError(f"{source.url} has no {wanted} at {source.commit[:10]}")
    return files


def _export(source: Git, clone: Path, folder: Path) -> None:
    """Write the wanted files of a clone into a new folder."""
    # The commit's id vouches for every file if each object is what its id says, which reading does not check.
    damaged = git.run(clone, "fsck", "--no-dangling", "--no-progress", check=False)
    if damaged.returncode != 0:
        raise PolycomError(f"{clone} is damaged: delete it to fetch it again ({git.last_words(damaged)})")
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git.run(clone, "read-tree", "--empty", environment=index)
        entries = "".join(f"{mode} {blob}\t{path}\0" for mode, blob, path in _files(clone, source))
        git.run(clone, "update-index", "-z", "--index-info", stdin=entries, environment=index)
        git.run(clone, "--work-tree", str(folder.resolve()), "checkout-index", "--all", environment=index)


def _compare(pin: Pin, source: Git, clone: Path, folder: Path) -> None:
    """Raise PolycomError unless the index has exactly the files that the commit names."""
    staged = git.output(folder, "ls-files", "--stage", "-z").rstrip("\0").split("\0")
    expected = [f"{mode} {blob} 0\t{path}" for mode, blob, path in _files(clone, source)]
    if sorted(staged) != sorted(expected):
        raise PolycomError(
            f"{pin.name}: the files on disk are not those of {source.commit}; is the disk full?"
        )
