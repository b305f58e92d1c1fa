"""git, without the user's identity, hooks, signatures or line endings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from polycom_ext.errors import PolycomError

IDENTITY = ("PolyCom", "polycom@users.noreply.github.com")
EPOCH = "2000-01-01T00:00:00+00:00"
"""Committer date of every commit made here, so that equal content has equal ids."""

_NEUTRAL = {
    "core.hooksPath": os.devnull,
    "core.autocrlf": "false",
    "core.quotePath": "false",
    "commit.gpgSign": "false",
    "user.name": IDENTITY[0],
    "user.email": IDENTITY[1],
    "advice.detachedHead": "false",
    "gc.auto": "0",
}


def _command(folder: Path, arguments: tuple[str, ...]) -> list[str]:
    settings = [part for key, value in _NEUTRAL.items() for part in ("-c", f"{key}={value}")]
    return ["git", "-C", str(folder), *settings, *arguments]


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("GIT_") or "CONFIG" in key
    }
    return {
        **inherited,
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_COMMITTER_DATE": EPOCH,
        **(extra or {}),
    }


def run(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run git in a folder; PolycomError with git's last words when it fails and `check` is set."""
    try:
        finished = subprocess.run(
            _command(folder, arguments),
            env=_environment(environment),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise PolycomError("git is not installed") from error
    if check and finished.returncode != 0:
        words = (finished.stderr or finished.stdout).strip().splitlines() or ["no message"]
        raise PolycomError(f"git {arguments[0]} failed in {folder}: {words[-1]}")
    return finished


def output(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What git prints, without the last newline."""
    return run(folder, *arguments, environment=environment).stdout.rstrip("\n")
