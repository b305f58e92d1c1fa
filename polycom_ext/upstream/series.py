"""A patch series: its files, their headers, and the commits that it makes of an upstream."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import git

FORM = ("--full-index", "--zero-commit", "--no-signature", "--no-numbered", "--no-renames", "--quiet")
"""How `git format-patch` writes a patch here."""

_UPSTREAM_STATUS = re.compile(r"Pending( \[.+\])?|(Submitted|Accepted|Backport|Denied|Inappropriate) \[.+\]")
_FIELD = re.compile(r"^([A-Z][A-Za-z-]+): +(\S.*)$", re.MULTILINE)
_INDEX = re.compile(r"^index ([0-9a-f]{40})\.\.([0-9a-f]{40})( \d+)?$", re.MULTILINE)
_NO_BLOB = "0" * 40


@dataclass(frozen=True)
class Change:
    """One file that a patch changes, and its blob ids before and after; None where there is no file."""

    path: str
    before: str | None
    after: str | None
    diff: str


@dataclass(frozen=True)
class Patch:
    """One patch in `git format-patch` form."""

    path: Path
    author: str
    address: str
    date: str
    subject: str
    body: str
    changes: tuple[Change, ...]

    @property
    def message(self) -> str:
        """Subject and body, as a commit has them."""
        return f"{self.subject}\n\n{self.body}\n"


def read_series(folder: Path | None) -> list[Patch]:
    """The patches that `series` names, in order; an empty list without a folder.

    Raises PolycomError for a missing series or patch and for one that cannot be read.
    """
    return [] if folder is None else [read_patch(folder / name) for name in names(folder)]


def names(folder: Path) -> list[str]:
    """The lines of `series` that are no comments. Raises PolycomError when it is missing."""
    series = folder / "series"
    if not series.is_file():
        raise PolycomError(
            f"{series} is missing: it names the patches of {folder.name}, one a line, in order"
        )
    lines = [line.strip() for line in series.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_patch(path: Path) -> Patch:
    """Read one patch. Raises PolycomError when it is missing or not in `format-patch --full-index` form."""
    if not path.is_file():
        raise PolycomError(f"{path} is missing, but its series names it")
    with tempfile.TemporaryDirectory() as scratch:
        parts = (Path(scratch) / "message", Path(scratch) / "diff")
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        told = git.run(Path(scratch), "mailinfo", "--encoding=UTF-8", *map(str, parts), stdin=text).stdout
        body, diff = (part.read_bytes().decode("utf-8", "surrogateescape") for part in parts)
    header = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
    lacking = [name for name in ("Author", "Email", "Subject", "Date") if not header.get(name)]
    if lacking or not text.startswith("From "):
        raise PolycomError(
            f"{path} is not in the form of `git format-patch`: From, Date and Subject are needed"
        )
    changes = tuple(
        _change(path, section) for section in re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE)[1:]
    )
    if not changes:
        raise PolycomError(f"{path} changes no file")
    author, address, subject, date = (header[name] for name in ("Author", "Email", "Subject", "Date"))
    return Patch(path, author, address, date, subject, body.strip(), changes)


def _change(patch: Path, section: str) -> Change:
    """The change that a section of a diff makes to one file; what cannot be checked by blob id is refused."""
    first, _, rest = section.partition("\n")
    # Both sides name the same file, so the line is `a/PATH b/PATH` and its middle is known even with blanks.
    sides = first.removeprefix("diff --git ")
    file = sides[len(sides) // 2 + 3 :]
    if sides != f"a/{file} b/{file}":
        raise PolycomError(f"{patch} renames or copies ({sides}): write it as a removal and an addition")
    index = _INDEX.search(rest.partition("\n@@ ")[0] + "\n")
    if index is None:
        raise PolycomError(f"{patch} does not give whole blob ids for {file} (git format-patch --full-index)")
    before, after = (None if blob == _NO_BLOB else blob for blob in index.groups()[:2])
    return Change(file, before, after, section)


def chains(patches: list[Patch]) -> dict[str, list[str | None]]:
    """The blob ids of every file that the patches change: upstream's, and after each patch that changes it.

    Raises PolycomError where a patch does not begin at what the one before it has made.
    """
    steps: dict[str, list[str | None]] = {}
    for patch in patches:
        for change in patch.changes:
            chain = steps.setdefault(change.path, [change.before])
            if chain[-1] != change.before:
                raise PolycomError(f"{patch.path.name} was made for another version of {change.path}")
            chain.append(change.after)
    return steps


def check_series(folder: Path | None) -> list[str]:
    """What is wrong with the series, its files and their headers; an empty list when nothing is."""
    if folder is None:
        return []
    listed = names(folder)
    present = {path.name for path in folder.glob("*.patch")}
    problems = [f"{name} is in series, but there is no such file" for name in listed if name not in present]
    problems += [f"{name} is not in series" for name in sorted(present - set(listed))]
    problems += [
        f"series names {name} twice" for name in sorted({name for name in listed if listed.count(name) > 1})
    ]
    for name in dict.fromkeys(listed):
        if name in present:
            try:
                problems += [f"{name} {problem}" for problem in _check_header(read_patch(folder / name))]
            except PolycomError as error:
                problems.append(str(error))
    return problems


def _check_header(patch: Patch) -> list[str]:
    problems = []
    fields = dict(_FIELD.findall(patch.body))
    if (patch.author, patch.address) != git.IDENTITY:
        problems.append(f"is not from {git.IDENTITY[0]} <{git.IDENTITY[1]}>: refresh it")
    problems += [f"has no {name}: line" for name in ("Origin", "Upstream-Status") if name not in fields]
    if not _UPSTREAM_STATUS.fullmatch(fields.get("Upstream-Status", "Pending")):
        problems.append(
            "has an Upstream-Status other than Pending, Submitted [where], Inappropriate [why] and the like"
        )
    if not _FIELD.sub("", patch.body).strip():
        problems.append("does not say why it is needed")
    return problems


def apply_series(
    tree: Path, base: str, patches: list[Patch], environment: Mapping[str, str] | None = None
) -> list[str]:
    """Commit the patches on top of commit `base` without touching the working tree, the index or any branch.

    Every file must have exactly the blob id that its patch names, before and after: no fuzz. Returns the
    commits, `base` first. Raises PolycomError for the first patch that does not fit, naming the files.
    """
    commits = [base]
    with tempfile.TemporaryDirectory() as scratch:
        index = {**(environment or {}), "GIT_INDEX_FILE": os.path.join(scratch, "index")}
        git.run(tree, "read-tree", base, environment=index)
        for patch in patches:
            wrong = _differing(tree, index, {change.path: change.before for change in patch.changes})
            if wrong:
                raise PolycomError(f"{patch.path.name} was made for another version of {', '.join(wrong)}")
            what = ("apply", "--cached", "--whitespace=nowarn", str(patch.path.resolve()))
            applied = git.run(tree, *what, environment=index, check=False)
            if applied.returncode != 0:
                raise PolycomError(f"{patch.path.name} does not apply: {git.last_words(applied)}")
            wrong = _differing(tree, index, {change.path: change.after for change in patch.changes})
            if wrong:
                raise PolycomError(f"{patch.path.name} does not make of {', '.join(wrong)} what it says")
            # A user's partial clone is without the files that nobody has asked for.
            content = git.output(tree, "write-tree", "--missing-ok", environment=index)
            commits.append(commit(tree, content, commits[-1], patch.message, patch.date, environment))
    return commits


def commit(
    tree: Path,
    content: str,
    parent: str,
    message: str,
    date: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Make a commit by the neutral identity, with only its date kept, and return its id."""
    dated = {**(environment or {}), "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    return git.run(
        tree, "commit-tree", content, "-p", parent, environment=dated, stdin=message
    ).stdout.strip()


def _differing(tree: Path, index: Mapping[str, str], expected: dict[str, str | None]) -> list[str]:
    listing = git.output(tree, "ls-files", "--stage", "-z", environment=index)
    found = {
        path: about.split()[1]
        for about, _, path in (line.partition("\t") for line in listing.split("\0"))
        if path
    }
    return sorted(path for path, blob in expected.items() if found.get(path) != blob)
