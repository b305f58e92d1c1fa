"""The series as commits on a branch of the user's own checkout.

The commits have the neutral identity and their patches' dates, so that they are known again by their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import git
from polycom_ext.upstream.series import Patch, apply_series, chains
from polycom_ext.upstream.trees import committed, indexed

_UNDER_WAY = (
    "MERGE_HEAD",
    "CHERRY_PICK_HEAD",
    "REVERT_HEAD",
    "BISECT_LOG",
    "rebase-merge",
    "rebase-apply",
    "index.lock",
)
"""Of a git directory, what is there while git is in the middle of something."""


@contextmanager
def made(folder: Path, name: str, patches: list[Patch]) -> Iterator[None]:
    """Commit the series on a new branch, and be on it once the block has written the files.

    Raises PolycomError, before the block, where that is not safe: what is committed or staged of the files is
    not upstream's, the branch is there already and is another or another working tree's, git is in the middle
    of something, there is no repository.
    """
    _at_rest(folder)
    reference = f"refs/heads/{name}"
    if git.run(folder, "check-ref-format", "--branch", name, check=False).returncode != 0:
        raise PolycomError(f"{name!r} is no name for a branch")
    head, on = _commit(folder, "HEAD"), _on(folder)
    if head is None:
        raise PolycomError(f"{folder} has no commit, in a form that is known here, to begin a branch at")
    if on == reference and _made_here(folder, patches):
        yield
        return
    steps, there = chains(patches), _blobs(committed(folder, "HEAD"))
    wrong = [path for path, blobs in steps.items() if there.get(path) != blobs[0]]
    if wrong:
        raise PolycomError(
            f"cannot commit the patches on a branch of {folder}: what is committed there of "
            f"{', '.join(wrong)} is not upstream's. Begin at a commit where it is"
        )
    _check_staged(folder, patches)
    last = apply_series(folder, head, patches)[-1]
    if _commit(folder, reference) not in (None, last) or _is_checked_out(folder, reference):
        raise PolycomError(f"{folder} has a branch {name} already: give --branch another name")
    git.run(folder, "update-ref", "-m", "polycom upstream apply", reference, last)
    yield
    _switch(folder, patches, last, on or head, reference)


@contextmanager
def left(folder: Path, patches: list[Patch]) -> Iterator[None]:
    """Go back to where `made` began, once the block has written the files; nothing if HEAD has no patches.

    Raises PolycomError, before the block, where HEAD has the patches but is not a branch as it was made.
    """
    there = _blobs(committed(folder, "HEAD")) if _commit(folder, "HEAD") else {}
    if not any(there.get(path) in blobs[1:] for path, blobs in chains(patches).items()):
        yield
        return
    on = _on(folder)
    named = on.removeprefix("refs/heads/") if on else "no branch"
    began = _commit(folder, "@{-1}")
    base = _commit(folder, f"HEAD~{len(patches)}")
    if began is None or began != base or not _made_here(folder, patches):
        raise PolycomError(
            f"the patches are commits in {folder}, on {named}: "
            "`git switch` to a branch without them, or `git revert` them"
        )
    _at_rest(folder)
    _check_staged(folder, patches)
    yield
    _switch(folder, patches, began, on or "HEAD", _full_name(folder, "@{-1}") or began)


def _switch(folder: Path, patches: list[Patch], commit: str, old: str, new: str) -> None:
    """Bring the index, for the series' files only, and HEAD to a commit whose files are there."""
    target = committed(folder, commit)
    entries = ""
    for path in chains(patches):
        entries += f"{target[path]}\t{path}\0" if path in target else f"0 {'0' * 40}\t{path}\0"
    git.run(folder, "update-index", "-z", "--index-info", stdin=entries)
    short = (name.removeprefix("refs/heads/") for name in (old, new))
    why = "checkout: moving from {} to {}".format(*short)  # by which git finds the way back
    if new.startswith("refs/"):
        git.run(folder, "symbolic-ref", "-m", why, "HEAD", new)
    else:
        git.run(folder, "update-ref", "--no-deref", "-m", why, "HEAD", new)
    git.run(folder, "update-index", "-q", "--refresh", check=False)  # what the user has edited is no failure


def _made_here(folder: Path, patches: list[Patch]) -> bool:
    """Whether HEAD's last commits are the series."""
    base = _commit(folder, f"HEAD~{len(patches)}")
    if base is None:
        return False
    try:
        return apply_series(folder, base, patches)[-1] == _commit(folder, "HEAD")
    except PolycomError:
        return False


def _at_rest(folder: Path) -> None:
    own = git.directory(folder)
    if own is None or own == folder:
        raise PolycomError(f"{folder} is not the top of a git checkout, so it can have no branch")
    busy = next((name for name in _UNDER_WAY if (own / name).exists()), None)
    if busy:
        raise PolycomError(f"git is in the middle of something in {folder} ({own / busy}): end that first")


def _is_checked_out(folder: Path, reference: str) -> bool:
    """Whether a working tree of the repository, this one or another, is on a branch."""
    own = git.directory(folder)
    assert own is not None
    heads = (git.shared(own) / "HEAD", *git.shared(own).glob("worktrees/*/HEAD"))
    return any(head.read_text().strip() == f"ref: {reference}" for head in heads if head.is_file())


def _check_staged(folder: Path, patches: list[Patch]) -> None:
    staged = _blobs(indexed(folder))
    wrong = [path for path, blobs in chains(patches).items() if staged.get(path) not in blobs]
    if wrong:
        raise PolycomError(
            f"what is staged in {folder} of {', '.join(wrong)} is not ours: unstage or commit it"
        )


def _blobs(files: dict[str, str]) -> dict[str, str]:
    return {path: about.split()[1] for path, about in files.items()}


def _commit(folder: Path, name: str) -> str | None:
    told = git.run(folder, "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}", check=False)
    return told.stdout.strip() if told.returncode == 0 else None


def _on(folder: Path) -> str | None:
    told = git.run(folder, "symbolic-ref", "--quiet", "HEAD", check=False)
    return told.stdout.strip() if told.returncode == 0 else None


def _full_name(folder: Path, name: str) -> str | None:
    return git.run(folder, "rev-parse", "--symbolic-full-name", name, check=False).stdout.strip() or None
