"""A small upstream, made on the fly as a wheel, with a pin and a series of two patches."""

import hashlib
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from polycom_ext.upstream import pins
from polycom_ext.upstream.pins import Pin

WHEEL = "small-1.0-py3-none-any.whl"
FILES = {
    "small/__init__.py": "from small.mlp import act\n",
    "small/mlp.py": "".join(f"line {n}\n" for n in range(30)),
    "small/config.py": "name = 'gelu'\n",
    "small/crlf.txt": "kept\r\nas it is\r\n",
}

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


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_wheel(path: Path, files: dict[str, str]) -> str:
    """Write a wheel and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """The upstream's wheel in the cache, its pin and its series; no tree yet."""
    made = Small(tmp_path, tmp_path / "patches", tmp_path / "cache")
    monkeypatch.setenv("POLYCOM_PATCHES", str(made.patches))
    monkeypatch.setenv("POLYCOM_CACHE", str(made.cache))
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(tmp_path / "trees"))
    sha256 = write_wheel(made.cache / "pypi" / WHEEL, FILES)
    made.series.mkdir(parents=True)
    (made.patches / "pins.toml").write_text(
        f'[small]\nversion = "1.0"\nseries = "small"\norigin = "here"\n'
        f'[small.wheel]\nproject = "small"\nfiles."{WHEEL}" = "{sha256}"\n'
    )
    work = tmp_path / "work"
    for name, text in FILES.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(text.encode())
    git(work, "init", "--quiet")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "base")
    for name, edits in PATCHED.items():
        for old, new in edits:
            (work / name).write_text((work / name).read_text().replace(old, new))
        why = "It is needed.\n\nOrigin: here\nUpstream-Status: Inappropriate [a test]"
        git(work, "commit", "--quiet", "--all", "-m", f"Change {Path(name).stem}", "-m", why)
    form = ("--full-index", "--zero-commit", "--no-signature", "-N", "--quiet")
    git(work, "format-patch", *form, "-o", str(made.series), "HEAD~2")
    names = sorted(path.name for path in made.series.glob("*.patch"))
    (made.series / "series").write_text("".join(f"{name}\n" for name in names))
    return made
