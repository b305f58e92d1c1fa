"""The state of an upstream's tree, and the ways from one state to another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, git
from polycom_ext.upstream.pins import Pin, trees_dir
from polycom_ext.upstream.series import apply_series, read_series

APPLIED_REF = "refs/polycom/applied"
"""What `apply` last made: known even after the series has changed."""
_MOVING_REF = "refs/polycom/moving"
"""Where an `apply` or `unapply` that has not ended is going."""
_UNKNOWN = "not a file"


class State(Enum):
    """What a tree is, and the exit status of `polycom upstream status`; 2 is for errors."""

    APPLIED = ("applied", 0)
    PRISTINE = ("pristine", 3)
    PARTLY = ("partly applied", 4)
    DRIFTED = ("drifted", 5)
    ABSENT = ("absent", 6)

    def __init__(self, title: str, exit_status: int) -> None:
        self.title = title
        self.exit_status = exit_status


@dataclass(frozen=True)
class Status:
    """A tree compared with its pin and its series, file by file."""

    pin: Pin
    tree: Path
    state: State
    patches: tuple[str, ...] = ()
    """The series."""
    patched: tuple[str, ...] = ()
    """Files that are as the series, whole or in part, makes them."""
    unpatched: tuple[str, ...] = ()
    """Files that the series changes and that are still upstream's."""
    foreign: tuple[str, ...] = ()
    """Files that others have edited, staged, committed, added or removed: not upstream's, not the series'."""
    outdated: bool = False
    """The tree was made from another version than the one that is pinned."""
    settled: bool = False
    """Branch, index and working tree agree, and nothing was interrupted."""

    def as_json(self) -> dict[str, object]:
        """For `--json` and for the versions beside a run."""
        return {
            "name": self.pin.name,
            "version": self.pin.version,
            "state": self.state.title,
            "tree": str(self.tree),
            "patches": list(self.patches),
            "patched": list(self.patched),
            "unpatched": list(self.unpatched),
            "foreign": list(self.foreign),
            "outdated": self.outdated,
        }


_Files = dict[str, str]  # path -> mode and blob id


def status(pin: Pin) -> Status:
    """Compare the tree with upstream and with every step of the series. Writes nothing into the tree.

    Raises PolycomError when the series itself is missing or does not fit the pinned upstream.
    """
    tree = trees_dir() / pin.name
    patches = read_series(pin.series)
    titles = tuple(patch.path.name for patch in patches)
    if not (tree / ".git").exists():
        return Status(pin, tree, State.ABSENT, titles)
    if not fetch.is_of(pin, fetch.first_message(tree)):
        return Status(pin, tree, State.DRIFTED, titles, outdated=True)
    with _scratch_objects(tree) as objects:
        steps = [committed(tree, step, objects) for step in apply_series(tree, base(tree), patches, objects)]
        interrupted = _has(tree, _MOVING_REF)
        known = [*steps, *(committed(tree, ref) for ref in (APPLIED_REF, _MOVING_REF) if _has(tree, ref))]
        current = _worktree(tree, objects)
        upstream, wanted = steps[0], steps[-1]
        head, index = committed(tree, "HEAD"), indexed(tree)
        edited = _unknown(current, known)
        if interrupted:
            edited -= {path for path in edited if _is_half_written(tree, path, known, objects)}
        foreign = edited | _unknown(index, known) | _unknown(head, known)
    changed = sorted(path for path in {*current, *upstream} if current.get(path) != upstream.get(path))
    series_files = sorted(path for path in {*wanted, *upstream} if wanted.get(path) != upstream.get(path))
    if foreign:
        state = State.DRIFTED
    elif current == wanted:
        state = State.APPLIED
    elif current == upstream:
        state = State.PRISTINE
    else:
        state = State.PARTLY
    return Status(
        pin,
        tree,
        state,
        titles,
        patched=tuple(path for path in changed if path not in foreign),
        unpatched=tuple(path for path in series_files if current.get(path) == upstream.get(path)),
        foreign=tuple(sorted(foreign)),
        settled=not interrupted and current == index == head,
    )


def apply(pin: Pin) -> Status:
    """Bring the tree to the end of its series: all of it or, on any refusal, nothing.

    Does nothing when it is there already, and finishes what an interruption left. Raises PolycomError, naming
    the files, when somebody else has edited the tree, and when a patch does not fit.
    """
    found = _ours(pin, "apply")
    if found.state is State.APPLIED and found.settled:
        return found
    with fetch.locked(pin) as lock:
        found = _ours(pin, "apply")
        commits = apply_series(found.tree, base(found.tree), read_series(pin.series))
        _move(found.tree, commits[-1], lock)
    return status(pin)


def unapply(pin: Pin) -> Status:
    """Bring the tree back to upstream. Raises PolycomError, naming the files, when others have edited it."""
    _ours(pin, "unapply")
    with fetch.locked(pin) as lock:
        found = _ours(pin, "unapply")
        _move(found.tree, base(found.tree), lock)
    return status(pin)


def base(tree: Path) -> str:
    """A tree's first commit: upstream as it was."""
    return git.output(tree, "rev-list", "--max-parents=0", "HEAD")


def differing(tree: Path, treeish: str) -> list[str]:
    """Files of the working tree or the index that are not as a commit has them."""
    expected = committed(tree, treeish)
    with _scratch_objects(tree) as objects:
        current = _worktree(tree, objects)
    index = indexed(tree)
    paths = {*expected, *current, *index}
    return sorted(path for path in paths if not expected.get(path) == current.get(path) == index.get(path))


def existing(pin: Pin) -> Path:
    """The tree of an upstream. Raises PolycomError when it is not fetched."""
    tree = trees_dir() / pin.name
    if not (tree / ".git").exists():
        raise PolycomError(f"{pin.name} is not fetched: run `polycom upstream fetch {pin.name}`")
    return tree


def _ours(pin: Pin, verb: str) -> Status:
    existing(pin)
    found = status(pin)
    if found.outdated:
        raise PolycomError(
            f"{found.tree} is not {pin.name} {pin.version} as it is pinned: move it away, then fetch"
        )
    if found.foreign:
        raise PolycomError(
            f"cannot {verb} {pin.name}: {found.tree} has changes that are not ours: "
            f"{', '.join(found.foreign)}. "
            f"Undo them, or commit them there and run `polycom upstream refresh {pin.name}`"
        )
    return found


def _move(tree: Path, commit: str, lock: int) -> None:
    """Bring index, working tree and branch to a commit; every file that this overwrites is known to be ours.

    A kill at any moment leaves the reference `moving`, by which `status` knows the half-written files again.
    """
    if _has(tree, _MOVING_REF):
        (tree / ".git" / "index.lock").unlink(missing_ok=True)  # of the git that was killed with its parent
    git.run(tree, "update-ref", _MOVING_REF, commit)
    git.run(tree, "reset", "--quiet", "--hard", commit, pass_fds=(lock,))
    git.run(tree, "update-ref", "--stdin", stdin=f"update {APPLIED_REF} {commit}\ndelete {_MOVING_REF}\n")


def _has(tree: Path, ref: str) -> bool:
    return git.run(tree, "rev-parse", "--quiet", "--verify", ref, check=False).returncode == 0


@contextmanager
def _scratch_objects(tree: Path) -> Iterator[dict[str, str]]:
    """Environment in which git writes new objects outside the tree, which another user or nobody may own."""
    with tempfile.TemporaryDirectory() as scratch:
        yield {
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": _quoted((tree / ".git" / "objects").resolve()),
        }


def _quoted(path: Path) -> str:
    """A path for a list that git divides at colons."""
    return '"' + os.fspath(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def committed(tree: Path, treeish: str, environment: dict[str, str] | None = None) -> _Files:
    listing = git.output(tree, "ls-tree", "-r", "-z", "--full-tree", treeish, environment=environment)
    entries = (entry.partition("\t") for entry in listing.split("\0") if entry)
    return {path: " ".join(about.split()[::2]) for about, _, path in entries}


def indexed(tree: Path, environment: dict[str, str] | None = None) -> _Files:
    listing = git.output(tree, "ls-files", "--stage", "-z", environment=environment)
    entries = (entry.partition("\t") for entry in listing.split("\0") if entry)
    return {path: " ".join(about.split()[:2]) for about, _, path in entries}


def _worktree(tree: Path, objects: dict[str, str]) -> _Files:
    """The working tree's content: tracked files, and untracked ones unless they were made by using it.

    Every file is read: git's own index trusts sizes and times, which an edit in the same second escapes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**objects, "GIT_INDEX_FILE": os.path.join(scratch, "index")}
        git.run(tree, "read-tree", base(tree), environment=environment)
        git.run(tree, "add", "--update", environment=environment)
        # Not `add --all`, which would pass over what upstream's own .gitignore names.
        exclude = [f"--exclude={pattern}" for pattern in git.IGNORED]
        listing = git.output(tree, "ls-files", "--others", "-z", *exclude, environment=environment)
        others = [path for path in listing.split("\0") if path]
        files = "".join(f"{path}\0" for path in others if not path.endswith("/"))
        git.run(tree, "update-index", "--add", "-z", "--stdin", stdin=files, environment=environment)
        repositories = {path: _UNKNOWN for path in others if path.endswith("/")}
        return {**indexed(tree, environment), **repositories}


def _unknown(files: _Files, known: list[_Files]) -> set[str]:
    """Paths that are in none of the known states."""
    paths = {*files, *known[0]}
    return {path for path in paths if all(files.get(path) != step.get(path) for step in known)}


def _is_half_written(tree: Path, path: str, known: list[_Files], objects: dict[str, str]) -> bool:
    """Whether a kill leaves this of a file that git was replacing: nothing, or its beginning."""
    if len({step.get(path) for step in known}) < 2:
        return False  # no step changes it, so nothing was replacing it
    file = tree / path
    if not file.exists():
        return True
    if not file.is_file():
        return False
    blobs = {step[path].split()[1] for step in known if path in step}
    wholes = [git.output(tree, "cat-file", "blob", blob, environment=objects) for blob in blobs]
    return any(whole.encode("utf-8", "surrogateescape").startswith(file.read_bytes()) for whole in wholes)
