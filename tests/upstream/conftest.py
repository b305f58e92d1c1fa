"""A small upstream, made on the fly as a wheel, with a pin and a series of two patches."""

import hashlib
import os
import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from polycom_ext.upstream import pins
from polycom_ext.upstream.git import IDENTITY
from polycom_ext.upstream.pins import Pin

WHEEL = "small-1.0-py3-none-any.whl"
FILES = {
    "small/__init__.py": "from small.mlp import act\n",
    "small/mlp.py": "".join(f"line {n}\n" for n in range(30)),
    "small/config.py": "name = 'gelu'\n",
    "small/crlf.txt": "kept\r\nas it is\r\n",
}

WHY = "It is needed.\n\nOrigin: here\nUpstream-Status: Inappropriate [a test]"
DATE = "2026-01-02T03:04:05+00:00"
FORM = ("--full-index", "--zero-commit", "--no-signature", "-N", "--quiet")

PATCHED = {
    "small/config.py": [("name = 'gelu'\n", "name = 'gelu'\nextra = None\n")],
    "small/mlp.py": [("line 3\n", "line three\n")],
}


@dataclass
class Small:
    """Where everything is."""

    folder: Path
    patches: Path
    cache: Path

    @property
    def pin(self) -> Pin:
        return pins.get("small")

    @property
    def tree(self) -> Path:
        return self.folder / "trees" / "small"

    @property
    def series(self) -> Path:
        return self.patches / "small"

    def set_upstream(self, files: dict[str, str]) -> None:
        """Pin a wheel of other files."""
        sha256 = write_wheel(self.cache / "pypi" / WHEEL, files)
        path = self.patches / "pins.toml"
        path.write_text(re.sub("[0-9a-f]{64}", sha256, path.read_text()))

    def set_series(self, edits: dict[str, tuple[str, str]]) -> None:
        """Write a series of one patch, from contents before and after it by file, upstream's or not."""
        work = self.folder / "other work"
        git(self.folder, "init", "--quiet", work.name)
        for step in (0, 1):
            for name, contents in edits.items():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_text(contents[step])
            git(work, "add", ".")
            git(work, "commit", "--quiet", "-m", "Change all", "-m", WHY, author=IDENTITY)
        for path in self.series.iterdir():
            path.unlink()
        git(work, "format-patch", *FORM, "-o", str(self.series), "HEAD~1")
        (self.series / "series").write_text("0001-Change-all.patch\n")

    def take_from_git(self, origin: Path | None = None) -> Path:
        """Pin the newest commit of the repository `work`, moved to `origin` if given, instead of the wheel.

        Returns that repository.
        """
        origin = (self.folder / "work").rename(origin or self.folder / "work")
        git(origin, "config", "uploadpack.allowFilter", "true")
        git(origin, "config", "uploadpack.allowAnySHA1InWant", "true")
        commit = git(origin, "rev-parse", "HEAD").strip()
        (self.patches / "pins.toml").write_text(
            f'[small]\nversion = "{commit[:8]}"\norigin = "here"\n'
            f'[small.git]\nurl = "file://{origin}"\ncommit = "{commit}"\npaths = ["small"]\n'
        )
        return origin


def git(folder: Path, *arguments: str, author: tuple[str, str] = ("T", "t@example.org")) -> str:
    """Run the user's own git, as somebody else unless `author` says otherwise."""
    who = ("-c", f"user.name={author[0]}", "-c", f"user.email={author[1]}")
    command = ["git", "-C", str(folder), *who, *arguments]
    environment = {**os.environ, "GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def write_wheel(path: Path, files: dict[str, str]) -> str:
    """Write a wheel and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)  # of one date, so that equal files have equal hashes
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """The upstream's wheel in the cache, its pin and its series; no tree yet."""
    return make_small(tmp_path, monkeypatch)


def make_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Make one below a folder, and name it in the environment."""
    made = Small(folder, folder / "patches", folder / "cache")
    monkeypatch.setenv("POLYCOM_PATCHES", str(made.patches))
    monkeypatch.setenv("POLYCOM_CACHE", str(made.cache))
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(folder / "trees"))
    sha256 = write_wheel(made.cache / "pypi" / WHEEL, FILES)
    made.series.mkdir(parents=True)
    (made.patches / "pins.toml").write_text(
        f'[small]\nversion = "1.0"\nseries = "small"\norigin = "here"\n'
        f'[small.pypi]\nproject = "small"\nfiles."{WHEEL}" = "{sha256}"\n'
    )
    work = folder / "work"
    for name, text in FILES.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(text.encode())
    git(work, "init", "--quiet")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "base")
    for name, edits in PATCHED.items():
        for old, new in edits:
            (work / name).write_text((work / name).read_text().replace(old, new))
        git(work, "commit", "--quiet", "--all", "-m", f"Change {Path(name).stem}", "-m", WHY, author=IDENTITY)
    git(work, "format-patch", *FORM, "-o", str(made.series), "HEAD~2")
    names = sorted(path.name for path in made.series.glob("*.patch"))
    (made.series / "series").write_text("".join(f"{name}\n" for name in names))
    return made
