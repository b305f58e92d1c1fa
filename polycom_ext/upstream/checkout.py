"""The patches on a checkout of the user's own, in its files or on a branch.

Only the files that the series changes count, as they are on disk, and each is known by its blob id: what else
is in the checkout is its user's. So the state needs no marker, the content before and after is made of the
files themselves, and nothing is asked of the user's git unless a branch is wanted or left.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from polycom_ext import files
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import branch, git
from polycom_ext.upstream.pins import Pin, trees_dir
from polycom_ext.upstream.series import Change, Patch, chains, check_series, read_series
from polycom_ext.upstream.trees import State, Status

_Contents = dict[str, bytes | None]  # path -> content; None where there is no file


@dataclass(frozen=True)
class _Checkout:
    """A checkout's files, those that the series changes."""

    status: Status
    patches: list[Patch]
    contents: _Contents

    @property
    def folder(self) -> Path:
        return self.status.tree


def status(pin: Pin, folder: Path) -> Status:
    """Compare the files that the series changes with upstream's and with every step of the series.

    Raises PolycomError for a folder that holds none of them, and for an upstream without patches.
    """
    return _read(pin, folder).status


def apply(pin: Pin, folder: Path, name: str | None = None) -> Status:
    """Patch the files, or leave them as they are: all or nothing.

    Args:
        pin: the upstream that the folder is a checkout of.
        folder: the top of the checkout.
        name: of a branch to make, to commit the series on, a commit each, and to be on afterwards.

    Raises PolycomError, naming the files, when one is not exactly as the series or upstream has it.
    """
    found = _ours(pin, folder, "apply")
    after = _moved(found, reverse=False)
    if name is None:
        _write(found.folder, found.contents, after)
    else:
        with branch.made(found.folder, name, found.patches):
            _write(found.folder, found.contents, after)
    return status(pin, folder)


def unapply(pin: Pin, folder: Path) -> Status:
    """Give the files back as upstream has them; from a branch that `apply` made, go back to where it began.

    Raises PolycomError, naming the files, when one is not exactly as the series or upstream has it, and when
    the patches are committed in another way.
    """
    found = _ours(pin, folder, "unapply")
    before = _moved(found, reverse=True)
    with branch.left(found.folder, found.patches):
        _write(found.folder, found.contents, before)
    return status(pin, folder)


def verify(pin: Pin, folder: Path) -> list[str]:
    """What is wrong with the series or with the checkout's files for it; nothing when all is well.

    The series is applied to a copy of the files and reversed; the checkout is only read.
    """
    problems = check_series(pin.series)
    if problems:
        return problems
    found = _read(pin, folder)
    if found.status.foreign:
        return [_unlike(found)]
    try:
        for reverse in (True, False, True):
            found = replace(found, contents=_moved(found, reverse=reverse))
    except PolycomError as error:
        return [str(error)]
    return []


def _read(pin: Pin, folder: Path) -> _Checkout:
    folder = folder.absolute()
    if not folder.is_dir():
        raise PolycomError(f"{folder} is no folder: give the top of a checkout of {pin.name} {pin.version}")
    if folder.resolve() == (trees_dir() / pin.name).resolve():
        raise PolycomError(f"{folder} is not a checkout of yours but the one kept here: leave out --tree")
    if pin.series is None:
        raise PolycomError(f"{pin.name} has no patches")
    patches = read_series(pin.series)
    known = chains(patches)
    contents = {path: _content(folder / path) for path in known}
    if all(content is None for content in contents.values()):
        raise PolycomError(
            f"{folder} is no checkout of {pin.name}: it has no {next(iter(known))}; give its top folder"
        )
    blobs = {path: _blob(content) for path, content in contents.items()}
    foreign = {path for path, steps in known.items() if blobs[path] not in steps}
    foreign |= {path for path in known if not _is_plain(folder, path)}
    unpatched = [path for path, steps in known.items() if blobs[path] == steps[0]]
    if foreign:
        state = State.DRIFTED
    elif all(blobs[path] == steps[-1] for path, steps in known.items()):
        state = State.APPLIED
    elif len(unpatched) == len(known):
        state = State.PRISTINE
    else:
        state = State.PARTLY
    found = Status(
        pin,
        folder,
        state,
        tuple(patch.path.name for patch in patches),
        patched=tuple(sorted({*known} - {*unpatched} - foreign)),
        unpatched=tuple(sorted({*unpatched} - foreign)),
        foreign=tuple(sorted(foreign)),
    )
    return _Checkout(found, patches, contents)


def _ours(pin: Pin, folder: Path, verb: str) -> _Checkout:
    found = _read(pin, folder)
    if found.status.foreign:
        raise PolycomError(f"cannot {verb} {pin.name}: {_unlike(found)}")
    return found


def _unlike(found: _Checkout) -> str:
    pin, foreign = found.status.pin, found.status.foreign
    steps = chains(found.patches)

    def has_other_line_ends(path: str) -> bool:
        content = found.contents[path]
        plain = (content or b"").replace(b"\r\n", b"\n")
        return plain != content and _blob(plain) in steps[path]

    if all(map(has_other_line_ends, foreign)):
        way_out = (
            "Only the ends of their lines differ: check them out again after `git config core.autocrlf input`"
        )
    else:
        way_out = f"Undo what was changed in them, or check out this version ({pin.origin})"
    return (
        f"in {found.folder} these files are not as {pin.name} {pin.version} has them: "
        f"{', '.join(foreign)}. {way_out}"
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _is_plain(folder: Path, path: str) -> bool:
    """Whether a path is a file or free, and reached without a link: a link is another's file, or no file."""
    file = folder / path
    return file.resolve() == folder.resolve() / path and (file.is_file() or not file.exists())


def _blob(content: bytes | None) -> str | None:
    """git's id of a content."""
    if content is None:
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _moved(found: _Checkout, *, reverse: bool) -> _Contents:
    """The contents after the series, or before it, wherever in it each file is.

    Every step must make exactly the recorded blobs. Raises PolycomError for a patch that does not.
    """

    def source(change: Change) -> str | None:
        return change.after if reverse else change.before

    def target(change: Change) -> str | None:
        return change.before if reverse else change.after

    now = dict(found.contents)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for path, content in now.items():
            if content is not None:
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                (copy / path).write_bytes(content)
        for patch in reversed(found.patches) if reverse else found.patches:
            due = [change for change in patch.changes if _blob(now[change.path]) == source(change)]
            if not due:
                continue
            what = ("apply", "--whitespace=nowarn", *(["--reverse"] if reverse else []), "-")
            told = git.run(copy, *what, stdin="".join(change.diff for change in due), check=False)
            if told.returncode != 0:
                raise PolycomError(f"{patch.path.name} does not apply: {git.last_words(told)}")
            now |= {change.path: _content(copy / change.path) for change in due}
            wrong = [change.path for change in due if _blob(now[change.path]) != target(change)]
            if wrong:
                raise PolycomError(f"{patch.path.name} does not make of {', '.join(wrong)} what it says")
    return now


def _write(folder: Path, before: _Contents, after: _Contents) -> None:
    """Replace the files that differ; all are written before the first takes its place."""
    with ExitStack() as whole:
        for path, content in after.items():
            file = folder / path
            if _content(file) != before[path]:
                raise PolycomError(f"{file} was changed meanwhile: give the command again")
            if content == before[path] or content is None:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            written = whole.enter_context(files.atomic(file, file.with_name(f".{file.name}.{os.getpid()}")))
            written.write(content)
            written.flush()
            if before[path] is not None:
                os.fchmod(written.fileno(), stat.S_IMODE(file.stat().st_mode))
    for path, content in after.items():
        if content is None and before[path] is not None:
            (folder / path).unlink()
