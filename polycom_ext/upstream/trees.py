"""The state of an upstream's tree, and the ways from one state to another."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, git
from polycom_ext.upstream.pins import Git, Pin
from polycom_ext.upstream.series import apply_series, check_series, read_series

_APPLIED_REF = "refs/polycom/applied"
"""What `apply` last made: known even after the series has changed."""


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
    patched: tuple[str, ...] = ()
    """Files that are as the series, whole or in part, makes them."""
    unpatched: tuple[str, ...] = ()
    """Files that the series changes and that are still upstream's."""
    foreign: tuple[str, ...] = ()
    """Files that are neither upstream's nor the series': edited, added or removed by somebody else."""

    def as_json(self) -> dict[str, object]:
        """For `--json` and for the versions beside a run."""
        return {
            "name": self.pin.name,
            "version": self.pin.version,
            "state": self.state.title,
            "tree": str(self.tree),
            "patches": [patch.path.name for patch in read_series(self.pin.series)],
            "patched": list(self.patched),
            "unpatched": list(self.unpatched),
            "foreign": list(self.foreign),
        }


def status(pin: Pin) -> Status:
    """Compare the tree with upstream and with every step of the series. Changes nothing."""
    tree = fetch.trees_dir() / pin.name
    if not (tree / ".git").exists():
        return Status(pin, tree, State.ABSENT)
    base = _base(tree)
    steps = [_blobs(tree, commit) for commit in apply_series(tree, base, read_series(pin.series))]
    known = [*steps]
    if git.run(tree, "rev-parse", "--quiet", "--verify", _APPLIED_REF, check=False).returncode == 0:
        known.append(_blobs(tree, _APPLIED_REF))
    current = _blobs(tree, _worktree(tree))
    upstream, wanted = steps[0], steps[-1]
    differs = sorted({path for path in {*current, *upstream} if current.get(path) != upstream.get(path)})
    foreign = [path for path in differs if all(current.get(path) != step.get(path) for step in known)]
    series_files = sorted({path for path in {*wanted, *upstream} if wanted.get(path) != upstream.get(path)})
    unpatched = [path for path in series_files if current.get(path) == upstream.get(path)]
    patched = [path for path in differs if path not in foreign]
    if foreign:
        state = State.DRIFTED
    elif current == wanted:
        state = State.APPLIED
    elif current == upstream:
        state = State.PRISTINE
    else:
        state = State.PARTLY
    return Status(pin, tree, state, tuple(patched), tuple(unpatched), tuple(foreign))


def apply(pin: Pin) -> Status:
    """Bring the tree to the end of its series: all of it or, on any refusal, nothing.

    Does nothing when it is there already, and finishes what an interruption left. Raises PolycomError, naming
    the files, when somebody else has edited the tree, and when a patch does not fit.
    """
    found = status(pin)
    if found.state is State.ABSENT:
        raise PolycomError(f"{pin.name} is not fetched: polycom upstream fetch {pin.name}")
    _refuse_foreign(found, "apply")
    last = apply_series(found.tree, _base(found.tree), read_series(pin.series))[-1]
    if found.state is not State.APPLIED or git.output(found.tree, "rev-parse", "HEAD") != last:
        _move(found.tree, last)
    return status(pin)


def unapply(pin: Pin) -> Status:
    """Bring the tree back to upstream. Raises PolycomError, naming the files, when others have edited it."""
    found = status(pin)
    if found.state is State.ABSENT:
        raise PolycomError(f"{pin.name} is not fetched, so there is nothing to undo")
    _refuse_foreign(found, "unapply")
    _move(found.tree, _base(found.tree))
    return status(pin)


def refresh(pin: Pin) -> list[Path]:
    """Write the tree's commits back as the series, and return its files.

    Raises PolycomError when the tree has changes that are not committed, or nothing to write.
    """
    if pin.series is None:
        raise PolycomError(f"{pin.name} has no series: give it one in pins.toml")
    tree = fetch.trees_dir() / pin.name
    if not (tree / ".git").exists():
        raise PolycomError(f"{pin.name} is not fetched: polycom upstream fetch {pin.name}")
    loose = git.output(tree, "status", "--porcelain")
    if loose:
        names = ", ".join(line[3:] for line in loose.splitlines())
        raise PolycomError(f"commit these changes in {tree} first, one purpose a commit: {names}")
    base = _base(tree)
    if git.output(tree, "rev-parse", "HEAD") == base:
        raise PolycomError(f"{tree} has no commits on top of upstream: nothing to write")
    with tempfile.TemporaryDirectory(dir=pin.series.parent) as scratch:
        form = ("--full-index", "--zero-commit", "--no-signature", "--no-numbered", "--quiet")
        git.run(tree, "format-patch", *form, "--output-directory", scratch, f"{base}..HEAD")
        made = sorted(Path(scratch).glob("*.patch"))
        (Path(scratch) / "series").write_text("".join(f"{path.name}\n" for path in made))
        pin.series.mkdir(exist_ok=True)
        for path in pin.series.glob("*.patch"):
            if path.name not in {patch.name for patch in made}:
                path.unlink()
        for path in [*made, Path(scratch) / "series"]:
            shutil.move(path, pin.series / path.name)
    git.run(tree, "update-ref", _APPLIED_REF, "HEAD")
    return [pin.series / path.name for path in made]


def verify(pin: Pin) -> list[str]:
    """Check the pin and its series from scratch; returns what is wrong, nothing when all is well.

    The source's hash; series against files both ways; headers; that the series applies to a fresh copy of
    upstream and, reversed, gives back upstream to the byte.
    """
    problems = check_series(pin.series)
    patches = read_series(pin.series)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / pin.name
        fetch.build(pin, copy)
        base = _base(copy)
        last = apply_series(copy, base, patches)[-1]
        git.run(copy, "read-tree", "-m", "-u", base, last)
        for patch in reversed(patches):
            git.run(copy, "apply", "--reverse", "--index", str(patch.path.resolve()))
        reversed_tree = _worktree(copy)
        if reversed_tree != git.output(copy, "rev-parse", f"{base}^{{tree}}"):
            problems.append("the reversed series does not give back upstream")
    return problems


def source_of(pin: Pin) -> str:
    """Where the pin's content comes from, for a person."""
    if isinstance(pin.source, Git):
        return f"{pin.source.url} at {pin.source.commit[:10]}"
    return f"PyPI {pin.source.project} {pin.version}"


def _refuse_foreign(found: Status, verb: str) -> None:
    if found.foreign:
        raise PolycomError(
            f"cannot {verb} {found.pin.name}: {found.tree} has changes that are not ours: "
            f"{', '.join(found.foreign)}"
        )


def _base(tree: Path) -> str:
    return git.output(tree, "rev-list", "--max-parents=0", "HEAD")


def _move(tree: Path, commit: str) -> None:
    """Bring index, working tree and branch to a commit; every file that this overwrites is ours."""
    git.run(tree, "update-ref", _APPLIED_REF, commit)
    (tree / ".git" / "index.lock").unlink(missing_ok=True)
    git.run(tree, "reset", "--quiet", "--hard", commit)


def _blobs(tree: Path, treeish: str) -> dict[str, str]:
    """path -> mode and blob id of everything in a commit or tree."""
    listing = git.output(tree, "ls-tree", "-r", "-z", "--full-tree", treeish)
    entries = (entry.split("\t", 1) for entry in listing.split("\0") if entry)
    return {path: about for about, path in entries}


def _worktree(tree: Path) -> str:
    """Id of a tree object with the working tree's content: tracked, and untracked unless made by using it.

    Every file is read: git's own index trusts sizes and times, which an edit in the same second escapes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        git.run(tree, "read-tree", _base(tree), environment=environment)
        git.run(tree, "add", "--all", environment=environment)
        return git.output(tree, "write-tree", environment=environment)
