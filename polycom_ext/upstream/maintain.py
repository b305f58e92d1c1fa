"""What a maintainer of a series does: check it from scratch, and write it anew from the tree's commits."""

from __future__ import annotations

import tempfile
from pathlib import Path

from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, git, trees
from polycom_ext.upstream.pins import Pin
from polycom_ext.upstream.series import FORM, apply_series, check_series, commit, read_series


def verify(pin: Pin) -> list[str]:
    """Check the pin and its series from scratch; returns what is wrong, nothing when all is well.

    The source's hash; series against files both ways; headers; that the series applies to a fresh copy of
    upstream and, reversed patch by patch, gives back upstream to the byte. Raises PolycomError when the
    source cannot be had or is not what is pinned.
    """
    problems = check_series(pin.series)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / pin.name
        fetch.build(pin, copy)
        if problems:
            return problems
        patches = read_series(pin.series)
        try:
            commits = apply_series(copy, trees.base(copy), patches)
        except PolycomError as error:
            return [str(error)]
        git.run(copy, "reset", "--quiet", "--hard", commits[-1])
        for patch, before in zip(reversed(patches), reversed(commits[:-1]), strict=True):
            undone = git.run(copy, "apply", "--reverse", "--index", str(patch.path.resolve()), check=False)
            if undone.returncode != 0 or trees.differing(copy, before):
                return [f"{patch.path.name}, reversed, does not give back what was before it"]
    return []


def refresh(pin: Pin) -> list[Path]:
    """Write the tree's commits back as the series, by a neutral identity, and return its files.

    Comments at the head of `series` stay. Raises PolycomError when the tree has changes that are not
    committed, or nothing to write.
    """
    if pin.series is None:
        raise PolycomError(f"{pin.name} has no series: give it one in pins.toml")
    tree = trees.existing(pin)
    with fetch.locked(pin):
        loose = trees.differing(tree, "HEAD")
        if loose:
            raise PolycomError(
                f"commit these changes in {tree} first, one purpose a commit: {', '.join(loose)}"
            )
        base = trees.base(tree)
        commits = git.output(tree, "rev-list", "--reverse", "--topo-order", f"{base}..HEAD").split()
        if not commits:
            raise PolycomError(f"{tree} has no commits on top of upstream: nothing to write")
        last = base
        for original in commits:
            date, message = git.output(tree, "show", "--no-patch", "--format=%aI%n%B", original).split(
                "\n", 1
            )
            last = commit(tree, f"{original}^{{tree}}", last, message, date)
        written = _write(tree, f"{base}..{last}", pin.series)
        git.run(tree, "update-ref", trees.APPLIED_REF, "HEAD")
    return written


def _write(tree: Path, commits: str, folder: Path) -> list[Path]:
    """Write commits into a folder as patches; files that would not change are not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    series = folder / "series"
    comments = ""
    if series.exists():
        for line in series.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.startswith("#"):
                break
            comments += line
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        git.run(tree, "format-patch", *FORM, "--output-directory", str(Path(scratch).resolve()), commits)
        made = sorted(Path(scratch).glob("*.patch"))
        (Path(scratch) / "series").write_text(
            comments + "".join(f"{path.name}\n" for path in made), encoding="utf-8"
        )
        for path in [
            *made,
            Path(scratch) / "series",
        ]:  # series last: until then the old one is whole or repeatable
            target = folder / path.name
            if not target.exists() or target.read_bytes() != path.read_bytes():
                path.replace(target)
    names = {path.name for path in made}
    for path in folder.glob("*.patch"):
        if path.name not in names:
            path.unlink()
    return [folder / path.name for path in made]
