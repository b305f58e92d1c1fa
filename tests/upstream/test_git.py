"""What git does here depends on pin, series and the tree's content: on nobody's settings, and on no place."""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polycom_ext import upstream
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import checkout as users
from polycom_ext.upstream import fetch, git, maintain, trees
from polycom_ext.upstream.trees import State

from . import conftest
from .conftest import FILES, WHY, Small, make_small

METHOD = "class A:\n    def f(self):\n" + "".join(f"        line{n}()\n" for n in range(30))
"""A hunk in the method begins, in git's own words, in `class A`, and in those of diff=python in `def f`."""
UPSTREAM = {
    **FILES,
    "small/method.py": METHOD,
    "small/other.py": METHOD,
    "small/.gitattributes": "other.py diff=python\n*.txt -diff\n",
}

SETTINGS = {
    "apply.ignoreWhitespace": "change",
    "apply.whitespace": "error",
    "attr.tree": "HEAD",
    "color.ui": "always",
    "commit.cleanup": "verbatim",
    "core.abbrev": "4",
    "core.bigFileThreshold": "1",
    "core.commentChar": "L",
    "core.eol": "crlf",
    "core.autocrlf": "true",
    "core.bare": "true",
    "core.fsmonitor": "{folder}/fails",
    "core.hooksPath": "{folder}/hooks",
    "core.ignoreCase": "true",
    "core.logAllRefUpdates": "always",
    "core.notesRef": "refs/heads/polycom",
    "core.quotePath": "true",
    "core.safecrlf": "true",
    "core.sparseCheckout": "true",
    "core.splitIndex": "true",
    "core.untrackedCache": "true",
    "core.whitespace": "tab-in-indent,cr-at-eol",
    "core.worktree": "{folder}",
    "core.attributesFile": "{folder}/attributes",
    "core.excludesFile": "{folder}/ignore",
    "diff.algorithm": "patience",
    "diff.context": "1",
    "diff.external": "false",
    "diff.indentHeuristic": "false",
    "diff.interHunkContext": "20",
    "diff.mnemonicPrefix": "true",
    "diff.noPrefix": "true",
    "diff.orderFile": "{folder}/fails",
    "diff.python.xfuncname": ".*",
    "diff.renames": "copies",
    "diff.suppressBlankEmpty": "true",
    "extensions.worktreeConfig": "true",
    "feature.experimental": "true",
    "filter.mine.clean": "false",
    "filter.mine.required": "true",
    "format.attach": "part",
    "format.coverLetter": "true",
    "format.encodeEmailHeaders": "true",
    "format.from": "Somebody <s@example.org>",
    "format.headers": "X-Mine: yes",
    "format.noprefix": "true",
    "format.notes": "true",
    "format.numbered": "true",
    "format.signature": "me",
    "format.signOff": "true",
    "format.subjectPrefix": "MINE",
    "format.suffix": ".mine",
    "format.thread": "true",
    "format.useAutoBase": "true",
    "gpg.program": "false",
    "commit.gpgSign": "true",
    "i18n.commitEncoding": "latin-1",
    "i18n.logOutputEncoding": "utf-16",
    "init.defaultObjectFormat": "sha256",
    "init.templateDir": "{folder}/template",
    "log.showSignature": "true",
    "mailinfo.scissors": "true",
    "merge.renames": "false",
    "status.showUntrackedFiles": "no",
    "user.name": "Somebody",
}
VARIABLES = {
    "GIT_DIR": "{other}/.git",
    "GIT_WORK_TREE": "{other}",
    "GIT_INDEX_FILE": "{other}/.git/index",
    "GIT_OBJECT_DIRECTORY": "{other}/.git/objects",
    "GIT_ATTR_SOURCE": "HEAD",
    "GIT_EXTERNAL_DIFF": "false",
    "GIT_DIFF_OPTS": "-u1",
    "GIT_AUTHOR_NAME": "Somebody Else",
    "GIT_COMMITTER_DATE": "2001-01-01T00:00:00",
    "GIT_CONFIG_PARAMETERS": "'diff.noprefix=true'",
    "GIT_CONFIG": "/nowhere",
    "GIT_DEFAULT_HASH": "sha256",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_ICASE_PATHSPECS": "1",
    "GIT_NAMESPACE": "mine",
    "GIT_QUARANTINE_PATH": "/nowhere",
    "GIT_TRACE": "1",
}
"""As a hook, an editor or a person may have set them."""


def deeds(small: Small) -> list[object]:
    """All that the patch manager does, and what comes of it: states, ids, files, and patches to the byte."""

    def told() -> object:
        return {key: value for key, value in trees.status(small.pin).as_json().items() if key != "tree"}

    def files(folder: Path) -> dict[str, bytes]:
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".git" not in path.parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    tree = upstream.ensure_applied("small")
    found: list[object] = [told(), files(tree), maintain.verify(small.pin)]
    method, other = tree / "small" / "method.py", tree / "small" / "other.py"
    for path in (method, other):
        path.write_text(path.read_text().replace("line20()", "line_20()") + "\n")
    (tree / "small" / "made new.txt").write_text("kept \r\nas it is\n")
    with pytest.raises(PolycomError) as refused:
        maintain.refresh(small.pin)
    found.append(str(refused.value).replace(str(small.folder), ""))
    git.run(tree, "add", "--all")
    git.run(tree, "commit", "--quiet", "--message", "Change more", "--message", WHY)
    found.append([path.name for path in maintain.refresh(small.pin)])
    found += [files(small.series), told()]
    trees.unapply(small.pin)
    found += [told(), files(tree)]
    trees.apply(small.pin)
    method.chmod(method.stat().st_mode | stat.S_IXUSR)
    (tree / "small" / "new.py").touch()
    found += [told(), git.output(tree, "rev-parse", "HEAD")]
    own = small.folder / "own"
    for name in (None, "polycom"):
        users.apply(small.pin, own, name)
        found += [users.verify(small.pin, own), files(own), git.output(own, "rev-parse", "HEAD")]
        users.unapply(small.pin, own)
        found += [files(own), git.output(own, "status", "--porcelain")]
    return found


def make_own(small: Small) -> None:
    """A checkout of the upstream, made in peace."""
    own = small.folder / "own"
    for name, text in UPSTREAM.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(text.encode())
    calm = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_DATE": git.EPOCH}
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "upstream"]):
        subprocess.run(
            ["git", *who, *command], cwd=own, env={**calm, "GIT_COMMITTER_DATE": git.EPOCH}, check=True
        )


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        small = make_small(tmp_path_factory.mktemp("peace"), monkeypatch)
        small.set_upstream(UPSTREAM)
        make_own(small)
        found = deeds(small)
    patch = (small.series / "0003-Change-more.patch").read_text()
    assert patch.count("@@ class A:\n") == 4
    assert "+kept \n" in patch
    return found


@pytest.fixture
def disturbed(small: Small, monkeypatch: pytest.MonkeyPatch) -> Small:
    """The same upstream, and beside it what the hostile settings name."""
    small.set_upstream(UPSTREAM)
    make_own(small)
    (small.folder / "hooks").mkdir()
    for name in ("pre-commit", "reference-transaction", "post-checkout", "post-index-change"):
        (small.folder / "hooks" / name).write_text("#!/bin/sh\nexit 1\n")
        (small.folder / "hooks" / name).chmod(0o755)
    (small.folder / "attributes").write_text("*.py diff=python\n* -diff\n")
    (small.folder / "ignore").write_text("*.py\n")
    (small.folder / "fails").write_text("#!/bin/sh\nexit 1\n")
    (small.folder / "fails").chmod(0o755)
    home = small.folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return small


def disturb(small: Small, place: str, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set something for the user, in the environment, or in the tree's own repository."""
    values = {name: SETTINGS[name].format(folder=small.folder) for name in settings}
    if place == "environment":
        monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(values)))
        for index, (name, value) in enumerate(values.items()):
            monkeypatch.setenv(f"GIT_CONFIG_KEY_{index}", name)
            monkeypatch.setenv(f"GIT_CONFIG_VALUE_{index}", value)
        return
    calm = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull}
    for file in _places(small, place, small.folder / "home" / ".gitconfig", "config"):
        for name, value in values.items():
            subprocess.run(["git", "config", "--file", str(file), name, value], check=True, env=calm)


def _places(small: Small, place: str, of_user: Path, name: str) -> list[Path]:
    """Where the user, or the repositories of the trees themselves, keep something."""
    if place == "user":
        return [of_user]
    upstream.ensure_applied("small")
    return [tree / ".git" / name for tree in (small.tree, small.folder / "own")]


def set_attributes(small: Small, place: str, attributes: str) -> None:
    """Give the user, or the tree's own repository, attributes; the latter passes over all modules, too."""
    of_user = small.folder / "home" / ".config" / "git" / "attributes"
    for file in _places(small, place, of_user, "info/attributes"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(attributes)
        if place == "tree":
            (file.parent / "exclude").write_text("*.py\n")


PLACES = ("user", "environment", "tree")


@pytest.mark.parametrize("place", PLACES)
def test_nobodys_settings_change_anything(
    disturbed: Small, place: str, monkeypatch: pytest.MonkeyPatch, in_peace: list[object]
) -> None:
    disturb(disturbed, place, [name for name in SETTINGS if name != "core.attributesFile"], monkeypatch)
    if place == "environment":
        other = disturbed.folder / "work"
        for name, value in VARIABLES.items():
            monkeypatch.setenv(name, value.format(other=other))
    else:
        set_attributes(disturbed, place, "*.py diff=python\n")
    assert deeds(disturbed) == in_peace


@pytest.mark.full
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("setting", ["core.attributesFile", "core.bigFileThreshold", "core.worktree"])
def test_no_setting_alone_changes_anything(
    disturbed: Small, place: str, setting: str, monkeypatch: pytest.MonkeyPatch, in_peace: list[object]
) -> None:
    """One may hide another: with a broken one, git may not come to the next."""
    disturb(disturbed, place, [setting], monkeypatch)
    assert deeds(disturbed) == in_peace


@pytest.mark.full
@pytest.mark.parametrize("place", ["user", "tree"])
@pytest.mark.parametrize(
    "attributes", ["*.py -diff\n", "* binary\n", "* text eol=crlf\n", "* filter=mine ident\n"]
)
def test_no_attribute_changes_anything(
    disturbed: Small, place: str, attributes: str, in_peace: list[object]
) -> None:
    set_attributes(disturbed, place, attributes)
    assert deeds(disturbed) == in_peace


def test_a_user_on_no_branch_gets_the_commit(small: Small) -> None:
    tree = upstream.ensure_applied("small")
    patched = conftest.git(tree, "rev-parse", "HEAD")
    conftest.git(tree, "checkout", "--quiet", "--detach")
    assert trees.unapply(small.pin).settled
    assert trees.apply(small.pin).settled
    assert conftest.git(tree, "rev-parse", "HEAD") == patched
    assert not conftest.git(tree, "status", "--porcelain")


@pytest.fixture
def elsewhere(small: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder on another file system, as in most containers."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == small.folder.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        monkeypatch.setattr("tempfile.tempdir", scratch)
        yield


@pytest.mark.usefixtures("elsewhere")
def test_the_temporary_folder_may_be_on_another_file_system(small: Small) -> None:
    tree = upstream.ensure_applied("small")
    conftest.git(tree, "checkout", "--quiet", "--detach")
    assert trees.unapply(small.pin).settled
    assert trees.apply(small.pin).settled


def test_nothing_is_left_in_the_temporary_folder(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = small.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    deeds_done = upstream.ensure_applied("small")
    maintain.refresh(small.pin)
    assert deeds_done.exists()
    assert list(scratch.iterdir()) == []


_SINGLE = ["a b", "-a", 'a"b', "a'b", "a\\b", "a\nb", "100%s", "$HOME", "caf\udce9", "ü", "#a", "a;b"]
STRANGE = ["a:b", "-".join(_SINGLE), *(pytest.param(name, marks=pytest.mark.full) for name in _SINGLE)]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name
    folder.mkdir()
    small = make_small(folder, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    fetch.fetch(small.pin)
    assert trees.apply(small.pin).state is State.APPLIED
    assert maintain.refresh(small.pin)
    assert maintain.verify(small.pin) == []
    assert trees.unapply(small.pin).state is State.PRISTINE
    small.take_from_git(tmp_path / "origin")
    shutil.rmtree(small.tree)
    assert fetch.fetch(small.pin).exists()


def test_a_tree_that_cannot_be_on_the_path_of_a_run_is_named(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH has no way to write a colon."""
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(small.folder / "a:b"))
    with pytest.raises(PolycomError, match="POLYCOM_UPSTREAM_DIR to a folder without one"):
        upstream.tree("small")


@pytest.mark.parametrize("variable", ["POLYCOM_PATCHES", "POLYCOM_CACHE", "POLYCOM_UPSTREAM_DIR"])
def test_relative_folders_are_those_of_the_working_directory(
    small: Small, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.folder)
    name = {"POLYCOM_PATCHES": "patches", "POLYCOM_CACHE": "cache", "POLYCOM_UPSTREAM_DIR": "trees"}[variable]
    monkeypatch.setenv(variable, name)
    if variable == "POLYCOM_PATCHES":
        monkeypatch.delenv("POLYCOM_UPSTREAM_DIR")  # the trees are beside the patches then
    tree = upstream.ensure_applied("small")
    assert tree.is_absolute()
    assert maintain.refresh(small.pin)
    assert maintain.verify(small.pin) == []
    assert trees.status(small.pin).state is State.APPLIED
    small.take_from_git()
    shutil.rmtree(tree)
    assert upstream.ensure_applied("small") == tree


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one file below a folder, committed."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "a.py").touch()
    conftest.git(folder, "init", "--quiet")
    conftest.git(folder, "add", ".")
    conftest.git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_the_commit_of_a_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = conftest.git(checkout, "rev-parse", "HEAD").strip()
    assert git.commit_of(checkout) == git.commit_of(checkout / "package") == commit
    (checkout / "elsewhere").touch()
    assert git.commit_of(checkout) == f"{commit}+changes"
    assert git.commit_of(checkout / "package") == commit
    (checkout / "package" / "untracked").mkdir()
    (checkout / "package" / "untracked" / "new.py").touch()
    assert git.commit_of(checkout / "package") == f"{commit}+changes"
    assert git.commit_of(checkout / "package" / "untracked") is None
    assert git.commit_of(checkout / "nowhere") is None
    assert git.commit_of(Path("/")) is None
    monkeypatch.setenv("PATH", str(checkout))
    assert git.commit_of(checkout) is None


@pytest.mark.parametrize("directory", ["foreign", "/nowhere"])
def test_the_commit_of_a_folder_is_not_that_of_git_dir(
    checkout: Path, small: Small, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = conftest.git(checkout, "rev-parse", "HEAD").strip()
    work = small.folder / "work"
    monkeypatch.setenv("GIT_DIR", str(work / ".git") if directory == "foreign" else directory)
    monkeypatch.setenv("GIT_WORK_TREE", str(work))
    assert git.commit_of(checkout) == commit


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_trees_and_checkouts_are_read(small: Small, checkout: Path) -> None:
    commit = git.commit_of(checkout)
    upstream.ensure_applied("small")
    for folder in (checkout, small.tree):
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 12345, 12345)
    assert git.commit_of(checkout) == commit is not None
    assert git.commit_of(small.tree) is not None
    assert trees.status(small.pin).state is State.APPLIED
    assert trees.unapply(small.pin).state is State.PRISTINE
    for folder in (checkout, small.tree):
        os.chown(folder, 0, 0)
