"""git as this package needs it: nothing that a user, a machine or a tree says about git changes what it does.

Settings and attributes come from the system, the user, the environment and the repository itself, and git
has hundreds of them; so they are not overridden one by one. As a linked working tree shares another's git
directory, each call gets one to share that is made for it: of links to the repository's objects and
references, and of settings and attributes of ours; HEAD and the index are where they always are. As the call
names both, neither GIT_DIR, nor a repository around the folder, nor its owner has a say in which is meant.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from polycom_ext.errors import PolycomError

IDENTITY = ("PolyCom", "polycom@users.noreply.github.com")
"""Author and committer of every commit made here."""
EPOCH = "2000-01-01T00:00:00+00:00"
"""Date of every commit made here that has none of its own, so that equal content has equal ids."""
IGNORED = ("__pycache__/", "*.py[co]", "*.so", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/")
"""Files that appear in a tree by using it; compiled files that upstream ships are committed all the same."""
KEEP_BYTES = "* -text -eol -ident -filter -working-tree-encoding !diff !whitespace\n"
"""Attributes by which git keeps files to the byte and has one form of patches, against upstream's own."""

_SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.autocrlf": "false",
    "core.quotePath": "false",
    "core.attributesFile": os.devnull,
    "core.excludesFile": os.devnull,
    "gc.auto": "0",
}
_ANYBODYS = {"core.hooksPath": os.devnull, "core.fsmonitor": "false", "safe.directory": "*"}
"""For a checkout under its user's settings: nothing of it is run, and it may be another user's."""
_SHARED = ("objects", "refs", "packed-refs", "logs", "shallow")
"""What a call sees of that which all working trees of a repository share."""
_ON_SETTINGS = ("init", "config", "remote", "fetch")
"""Commands that make or write a repository's own settings, and so need the real ones."""
_NETWORK = ("GIT_ASKPASS", "GIT_SSH", "GIT_SSL", "GIT_PROXY", "GIT_HTTP", "GIT_ALLOW_PROTOCOL")
"""Beginnings of the variables by which users say how git reaches the network."""
_NETWORK_SETTINGS = re.compile(
    r"(http|url|credential|ssh|protocol)\..+|core\.(sshcommand|gitproxy|askpass)|safe\.directory"
)
"""The same in the user's configuration."""


def run(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    check: bool = True,
    users_network: bool = False,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run git in a folder: the top of a working tree, a bare repository, or no repository at all.

    Args:
        environment: variables of git's own to add.
        stdin: what git reads.
        check: raise PolycomError with git's last words when it fails.
        users_network: let the user's proxies, credentials and mirrors take part, and nothing else of theirs.
        pass_fds: descriptors that stay open in git, so that a lock outlives this process as long as git does.
    """
    with _repository(folder, arguments[0]) as repository, _users_network(folder, users_network) as network:
        told = _start(folder, arguments, {**repository, **network, **(environment or {})}, stdin, pass_fds)
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


def commit_of(folder: Path) -> str | None:
    """The commit that a folder is at, `+changes` where its files differ from it; for a record or a cache.

    The folder may be any in anybody's checkout. Its user's settings decide what counts as a change; which
    checkout it is, the folder alone: not GIT_DIR and its like, which a hook or an editor sets. None where git
    is not installed, cannot read the checkout, or has no file of the folder.
    """

    def ask(*arguments: str) -> str | None:
        with contextlib.suppress(PolycomError):
            told = _start(folder, arguments, {"GIT_OPTIONAL_LOCKS": "0"}, settings=_ANYBODYS)
            return told.stdout.strip() if told.returncode == 0 else None
        return None

    if not ask("ls-files", "--", "."):
        return None
    commit = ask("rev-parse", "--verify", "HEAD")
    changes = ask("status", "--porcelain", "--untracked-files=normal", "--", ".")
    return None if commit is None or changes is None else f"{commit}+changes" if changes else commit


def _start(
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdin: str = "",
    pass_fds: tuple[int, ...] = (),
    settings: Mapping[str, str] = _SETTINGS,
) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    try:
        # Bytes, because text mode would change line ends.
        finished = subprocess.run(
            ["git", *options, *arguments],
            cwd=folder,
            env={**inherited, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **environment},
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
            check=False,
            pass_fds=pass_fds,
        )
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == "git":
            raise PolycomError("git is not installed: the patch manager needs git 2.32 or later") from error
        raise PolycomError(f"git cannot be started in {folder}: {error.strerror}") from error
    said, complained = (
        part.decode("utf-8", "surrogateescape") for part in (finished.stdout, finished.stderr)
    )
    return subprocess.CompletedProcess(finished.args, finished.returncode, said, complained)


@contextmanager
def _repository(folder: Path, command: str) -> Iterator[dict[str, str]]:
    """The environment that says which repository a call is about and by which settings."""
    own = directory(folder)
    says = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_DEFAULT_HASH": "sha1",
        "GIT_DEFAULT_REF_FORMAT": "files",
        "GIT_AUTHOR_NAME": IDENTITY[0],
        "GIT_AUTHOR_EMAIL": IDENTITY[1],
        "GIT_AUTHOR_DATE": EPOCH,
        "GIT_COMMITTER_NAME": IDENTITY[0],
        "GIT_COMMITTER_EMAIL": IDENTITY[1],
        "GIT_COMMITTER_DATE": EPOCH,
    }
    if command == "init":
        yield says
        return
    says["GIT_DIR"] = str(own or folder.absolute())
    if command in _ON_SETTINGS:
        yield says
        return
    with tempfile.TemporaryDirectory(prefix="polycom-git-") as scratch:
        _assemble(own, Path(scratch), bare=own == folder.absolute())
        if own is None:
            says["GIT_DIR"] = scratch
        else:
            says["GIT_COMMON_DIR"] = scratch
            if own != folder.absolute():
                says["GIT_WORK_TREE"] = str(folder.absolute())
        yield says


def directory(folder: Path) -> Path | None:
    """The git directory of a working tree or of a bare repository; None for a folder that is neither's top.

    Where `git worktree` and submodules have a file, it is the one that the file names.
    """
    folder = folder.absolute()
    own = folder / ".git"
    if own.is_file():
        named = own.read_bytes().decode("utf-8", "surrogateescape").rstrip("\n")
        own = folder / named.removeprefix("gitdir: ")
    elif not own.is_dir():
        own = folder
    return own if (own / "HEAD").is_file() else None


def shared(own: Path) -> Path:
    """Of a working tree's git directory, the one that holds what all working trees of a repository share."""
    names = own / "commondir"
    return own if not names.is_file() else (own / os.fsdecode(names.read_bytes()).rstrip("\n")).resolve()


def _assemble(own: Path | None, seen: Path, *, bare: bool) -> None:
    """Make the part of a git directory that all its working trees share: theirs, under our settings."""
    settings = f"[core]\n\trepositoryformatversion = 0\n\tbare = {str(bare).lower()}\n"
    if own is None:
        (seen / "objects").mkdir()
        (seen / "refs").mkdir()
        (seen / "HEAD").write_text("ref: refs/heads/none\n")
    else:
        common = shared(own)
        for name in _SHARED:
            if (common / name).exists() or name == "packed-refs":  # which git may have to write
                (seen / name).symlink_to(common / name)
        # What `git init` found out about the file system.
        if re.search(
            rb"^\s*filemode\s*=\s*false\s*$", (common / "config").read_bytes(), re.MULTILINE | re.IGNORECASE
        ):
            settings += "\tfilemode = false\n"
        if bare:  # a clone in the cache, which is without the files that nobody wants
            settings += '[remote "origin"]\n\tpromisor = true\n'
    (seen / "config").write_text(settings)
    (seen / "info").mkdir()
    (seen / "info" / "attributes").write_text(KEEP_BYTES)
    (seen / "info" / "exclude").write_text("\n".join(IGNORED) + "\n")


@contextmanager
def _users_network(folder: Path, wanted: bool) -> Iterator[dict[str, str]]:
    """Variables by which git sees the part of the user's configuration that is about the network."""
    if not wanted:
        yield {}
        return
    kept = {key: value for key, value in os.environ.items() if key.startswith(_NETWORK)}
    theirs = {
        key: value for key, value in os.environ.items() if key.startswith("GIT_CONFIG_") or key == "HOME"
    }
    listed = _start(
        folder, ("config", "--list", "--null", "--show-scope"), {**theirs, "GIT_DIR": str(folder)}
    )
    if listed.returncode != 0:
        raise PolycomError(f"git cannot read your configuration: {last_words(listed)}")
    with tempfile.TemporaryDirectory(prefix="polycom-git-") as scratch:
        file = Path(scratch) / "config"
        file.touch()
        fields = listed.stdout.split("\0")
        for scope, entry in zip(fields[::2], fields[1::2], strict=False):
            key, _, value = entry.partition("\n")
            if scope != "local" and _NETWORK_SETTINGS.fullmatch(key):
                _start(folder, ("config", "--file", str(file), "--add", key, value), {})
        yield {**kept, "GIT_CONFIG_GLOBAL": str(file)}
