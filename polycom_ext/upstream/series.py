"""A patch series: its files, their headers, and the trees that it makes of an upstream."""

from __future__ import annotations

import email
import email.policy
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import git

_INDEX = re.compile(r"^index ([0-9a-f]+)\.\.([0-9a-f]+)", re.MULTILINE)
_FILE = re.compile(r"^diff --git a/(\S+) b/(\S+)$", re.MULTILINE)
_NO_BLOB = "0" * 40


@dataclass(frozen=True)
class Change:
    """One file that a patch changes, and its blob ids before and after; None where there is no file."""

    path: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Patch:
    """One patch in `git format-patch` form."""

    path: Path
    author: str
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
    if folder is None:
        return []
    series = folder / "series"
    if not series.is_file():
        raise PolycomError(
            f"{series} is missing: it names the patches of {folder.name}, one a line, in order"
        )
    names = [line.strip() for line in series.read_text(encoding="utf-8").splitlines()]
    return [read_patch(folder / name) for name in names if name and not name.startswith("#")]


def read_patch(path: Path) -> Patch:
    """Read one patch. Raises PolycomError when it is missing or not in `format-patch --full-index` form."""
    if not path.is_file():
        raise PolycomError(f"{path} is missing, but its series names it")
    text = path.read_text(encoding="utf-8")
    message = email.message_from_string(text.split("\n", 1)[-1], policy=email.policy.default)
    payload = str(message.get_payload())
    body, _, diff = payload.partition("\n---\n")
    subject = re.sub(r"^\[PATCH[^]]*\]\s*", "", str(message["Subject"] or ""))
    if not text.startswith("From ") or not subject or not message["From"] or not message["Date"]:
        raise PolycomError(
            f"{path} is not in the form of `git format-patch`: From, Date and Subject are needed"
        )
    starts = [match.start() for match in _FILE.finditer(diff)]
    changes = []
    for start, end in zip(starts, [*starts[1:], len(diff)], strict=True):
        header = _FILE.match(diff, start)
        index = _INDEX.search(diff, start, end)
        assert header is not None
        if index is None or len(index[1]) != 40 or len(index[2]) != 40:
            raise PolycomError(
                f"{path} does not give whole blob ids for {header[2]} (git format-patch --full-index)"
            )
        before, after = (None if blob == _NO_BLOB else blob for blob in index.groups())
        changes.append(Change(header[2], before, after))
    if not changes:
        raise PolycomError(f"{path} changes no file")
    return Patch(path, str(message["From"]), str(message["Date"]), subject, body.strip(), tuple(changes))


def check_series(folder: Path | None) -> list[str]:
    """What is wrong with the series and its headers; an empty list when nothing is."""
    patches = read_series(folder)
    if folder is None:
        return []
    named = {patch.path.name for patch in patches}
    problems = [
        f"{path.name} is not in series" for path in sorted(folder.glob("*.patch")) if path.name not in named
    ]
    if len(named) < len(patches):
        problems.append("series names a patch twice")
    for patch in patches:
        fields = dict(re.findall(r"^([A-Z][A-Za-z-]+): (\S.*)$", patch.body, re.MULTILINE))
        problems += [
            f"{patch.path.name} has no {name}: line"
            for name in ("Origin", "Upstream-Status")
            if name not in fields
        ]
        reasons = [
            line for line in patch.body.splitlines() if line and not re.match(r"[A-Z][A-Za-z-]+: ", line)
        ]
        if not reasons:
            problems.append(f"{patch.path.name} does not say why it is needed")
    return problems


def apply_series(tree: Path, base: str, patches: list[Patch]) -> list[str]:
    """Commit the patches on top of commit `base` without touching the working tree or any branch.

    Every file must have exactly the blob id that its patch names, before and after. Returns the commits,
    `base` first. Raises PolycomError for the first patch that does not fit, naming the file.
    """
    commits = [base]
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        git.run(tree, "read-tree", base, environment=index)
        for patch in patches:
            for change in patch.changes:
                if _blob(tree, change.path, index) != change.before:
                    raise PolycomError(f"{patch.path.name} was made for another version of {change.path}")
            applied = git.run(
                tree, "apply", "--cached", str(patch.path.resolve()), environment=index, check=False
            )
            if applied.returncode != 0:
                raise PolycomError(
                    f"{patch.path.name} does not apply: {applied.stderr.strip().splitlines()[-1]}"
                )
            for change in patch.changes:
                if _blob(tree, change.path, index) != change.after:
                    raise PolycomError(f"{patch.path.name} does not make the {change.path} that it names")
            commits.append(_commit(tree, patch, commits[-1], index))
    return commits


def _blob(tree: Path, path: str, index: dict[str, str]) -> str | None:
    entry = git.output(tree, "ls-files", "--stage", "--", path, environment=index)
    return entry.split()[1] if entry else None


def _commit(tree: Path, patch: Patch, parent: str, index: dict[str, str]) -> str:
    content = git.output(tree, "write-tree", environment=index)
    name, _, address = patch.author.partition(" <")
    author = {
        "GIT_AUTHOR_NAME": name.strip('"'),
        "GIT_AUTHOR_EMAIL": address.rstrip(">"),
        "GIT_AUTHOR_DATE": patch.date,
    }
    made = git.run(tree, "commit-tree", content, "-p", parent, environment=author, stdin=patch.message)
    return made.stdout.strip()
