"""git, without the user's identity, hooks, signatures, ignored files or line endings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from polycom_ext.errors import PolycomError

IDENTITY = ("PolyCom", "polycom@users.noreply.github.com")
"""Author and committer of every commit made here."""
EPOCH = "2000-01-01T00:00:00+00:00"
"""Committer date of every commit made here, so that equal content has equal ids."""

_SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.autocrlf": "false",
    "core.quotePath": "false",
    "gc.auto": "0",
}
"""Said on the command line, because it beats what a user has set in the tree's own .git/config."""

_NETWORK = ("GIT_CONFIG", "GIT_SSH", "GIT_SSL", "GIT_PROXY", "GIT_HTTP")
"""Beginnings of the variables by which users say how git reaches the network."""


def _command(folder: Path, arguments: Sequence[str]) -> list[str]:
    # A container may mount a tree that another user owns; with no hooks and no monitor, nothing of it is run.
    settings = {**_SETTINGS, "safe.directory": str(folder.resolve())}
    return [
        "git",
        *(part for key, value in settings.items() for part in ("-c", f"{key}={value}")),
        *arguments,
    ]


def _environment(folder: Path, extra: Mapping[str, str] | None, users_settings: bool) -> dict[str, str]:
    kept = _NETWORK if users_settings else ()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(kept)}
    if not users_settings:
        inherited.update({"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"})
    return {
        **inherited,
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        # Where the folder is no repository, git must not take the project's own repository around it.
        "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent),
        "GIT_AUTHOR_NAME": IDENTITY[0],
        "GIT_AUTHOR_EMAIL": IDENTITY[1],
        "GIT_AUTHOR_DATE": EPOCH,
        "GIT_COMMITTER_NAME": IDENTITY[0],
        "GIT_COMMITTER_EMAIL": IDENTITY[1],
        "GIT_COMMITTER_DATE": EPOCH,
        **(extra or {}),
    }


def run(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    check: bool = True,
    users_settings: bool = False,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run git in a folder.

    Args:
        environment: variables of git's own to add.
        stdin: what git reads.
        check: raise PolycomError with git's last words when it fails.
        users_settings: let the user's configuration take part: proxies, credentials and mirrors.
        pass_fds: descriptors that stay open in git, so that a lock outlives this process as long as git does.
    """
    try:
        # Bytes, because text mode would change line ends.
        finished = subprocess.run(
            _command(folder, arguments),
            cwd=folder,
            env=_environment(folder, environment, users_settings),
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
            check=False,
            pass_fds=pass_fds,
        )
    except FileNotFoundError as error:
        raise PolycomError("git is not installed: the patch manager needs git 2.32 or later") from error
    said, complained = (
        part.decode("utf-8", "surrogateescape") for part in (finished.stdout, finished.stderr)
    )
    told = subprocess.CompletedProcess(finished.args, finished.returncode, said, complained)
    if check and told.returncode != 0:
        raise PolycomError(f"git {arguments[0]} failed in {folder}: {last_words(told)}")
    return told


def last_words(finished: subprocess.CompletedProcess[str]) -> str:
    """The last line that a git which failed has said."""
    lines = (finished.stderr or finished.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {finished.returncode}, and no message"


def output(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What git prints, without the last newline."""
    return run(folder, *arguments, environment=environment).stdout.rstrip("\n")
