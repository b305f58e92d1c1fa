"""The patches on a checkout of the user's own: in its files or on a branch, and gone again to the byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import checkout
from polycom_ext.upstream.git import IDENTITY
from polycom_ext.upstream.series import read_series
from polycom_ext.upstream.trees import State

from .conftest import DATE, FILES, FORM, PATCHED, WHY, Small, git
from .test_trees import content

Polycom = Callable[..., int]


@pytest.fixture
def own(small: Small) -> Path:
    """A clone at upstream's commit, on the user's branch, with a commit, an edit and a file of the user's."""
    return make_own(small, small.folder / "own")


def make_own(small: Small, folder: Path) -> Path:
    git(small.folder, "clone", "--quiet", str(small.folder / "work"), str(folder))
    return make_mine(folder)


def make_mine(folder: Path) -> Path:
    git(folder, "checkout", "--quiet", "--no-track", "-b", "mine", "HEAD~2")
    (folder / "mine.py").write_text("mine = 1\n")
    git(folder, "add", "mine.py")
    git(folder, "commit", "--quiet", "-m", "Mine")
    (folder / "small" / "__init__.py").write_text("edited = True\n")
    (folder / "untracked.py").touch()
    return folder


@pytest.fixture
def polycom(own: Path) -> Polycom:
    """`polycom upstream VERB small --tree OWN …`"""
    return lambda verb, *more: cli.main(["upstream", verb, "small", "--tree", str(own), *more])


def patched(text: dict[str, str] = FILES) -> dict[str, bytes]:
    result = dict(text)
    for name, edits in PATCHED.items():
        for old, new in edits:
            result[name] = result[name].replace(old, new)
    return {name: result[name].encode() for name in PATCHED}


def of_git(tree: Path) -> list[str]:
    """What the user's git knows: commit, branch, index, references."""
    asked = ("rev-parse HEAD", "branch --show-current", "ls-files --stage", "for-each-ref")
    return [git(tree, *command.split()) for command in asked]


def test_the_users_files_are_patched_and_given_back_to_the_byte(own: Path, polycom: Polycom) -> None:
    """What is the user's in the rest of the checkout, committed or not, is no drift and stays."""
    before, known = content(own), of_git(own)
    (own / "small" / "mlp.py").chmod(0o660)
    modes = {path: path.stat().st_mode for path in own.rglob("*.py")}
    assert polycom("status") == State.PRISTINE.exit_status
    assert polycom("apply") == 0
    assert content(own) == before | patched()
    assert {path: path.stat().st_mode for path in own.rglob("*.py")} == modes
    assert polycom("status") == polycom("verify") == polycom("apply") == 0
    assert polycom("unapply") == 0
    assert (content(own), of_git(own)) == (before, known)


def test_the_status_of_a_checkout_for_a_program(
    own: Path, polycom: Polycom, capsys: pytest.CaptureFixture[str]
) -> None:
    polycom("apply")
    (own / "small" / "mlp.py").write_text(FILES["small/mlp.py"])
    capsys.readouterr()
    assert polycom("status", "--json") == State.PARTLY.exit_status
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["tree"]) == ("partly applied", str(own))
    assert (told["patched"], told["unpatched"]) == (["small/config.py"], ["small/mlp.py"])


@pytest.mark.parametrize("verb", ["apply", "unapply"])
def test_what_is_partly_applied_can_go_either_way(own: Path, polycom: Polycom, verb: str) -> None:
    before = content(own)
    polycom("apply")
    (own / "small" / "mlp.py").write_text(FILES["small/mlp.py"])
    assert polycom(verb) == 0
    assert content(own) == (before | patched() if verb == "apply" else before)


def edit(file: Path, how: str) -> None:
    if how == "changed":
        file.write_bytes(file.read_bytes() + b"#")
    elif how == "removed":
        file.unlink()
    elif how == "line ends":
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    elif how == "linked":
        file.rename(file.with_name("other"))
        file.symlink_to("other")
    else:
        file.unlink()
        file.mkdir()


@pytest.mark.parametrize("how", ["changed", "removed", "line ends", "linked", "a folder"])
def test_an_edit_in_a_patched_file_is_refused_by_name(
    own: Path, polycom: Polycom, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(own / "small" / "mlp.py", how)
    before, known = content(own), of_git(own)
    for verb in (["apply"], ["unapply"], ["apply", "--branch", "polycom"]):
        assert polycom(*verb) == 2
        told = capsys.readouterr().err
        assert "these files are not as small 1.0 has them: small/mlp.py. " in told
        assert ("autocrlf" if how == "line ends" else "check out this version (here)") in told
    assert polycom("status") == State.DRIFTED.exit_status
    assert polycom("verify") == 1
    assert (content(own), of_git(own)) == (before, known)


def test_a_folder_of_a_patched_file_that_is_a_link_is_refused(own: Path, polycom: Polycom) -> None:
    """It may be shared with other checkouts."""
    (own / "small").rename(own / "elsewhere")
    (own / "small").symlink_to("elsewhere")
    assert polycom("apply") == 2
    assert content(own)["elsewhere/mlp.py"] == FILES["small/mlp.py"].encode()


def test_when_one_file_cannot_be_written_none_is(own: Path, polycom: Polycom) -> None:
    before = content(own)
    (own / "small" / f".mlp.py.{os.getpid()}").mkdir()  # where it is to be written before it takes its place
    assert polycom("apply") == 2
    assert content(own) == before


def test_a_file_that_several_patches_change_is_known_at_each_step(small: Small, own: Path) -> None:
    work, file = small.folder / "work", own / "small" / "config.py"
    steps = [FILES["small/config.py"], (work / "small" / "config.py").read_text(), "name = 'silu'\n"]
    (work / "small" / "config.py").write_text(steps[2])
    git(work, "commit", "--quiet", "--all", "-m", "Use silu", "-m", WHY, author=IDENTITY)
    git(work, "format-patch", *FORM, "--start-number", "3", "-o", str(small.series), "HEAD~1")
    with (small.series / "series").open("a") as series:
        series.write("0003-Use-silu.patch\n")
    for text, state in zip(steps, (State.PRISTINE, State.PARTLY, State.PARTLY), strict=True):
        file.write_text(text)
        assert checkout.status(small.pin, own).state is state
        assert checkout.apply(small.pin, own).state is State.APPLIED
        assert file.read_text() == steps[2]
        file.write_text(text)
        assert checkout.unapply(small.pin, own).state is State.PRISTINE
        assert file.read_text() == steps[0]


def test_an_edit_that_comes_while_patching_is_not_lost(
    small: Small, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, file = content(own), own / "small" / "config.py"
    run = checkout.git.run

    def type_and_run(*arguments: Any, **options: Any) -> Any:
        file.write_text("typed\n")
        return run(*arguments, **options)

    found = read_series(small.pin.series)
    monkeypatch.setattr(checkout, "read_series", lambda folder: found)
    monkeypatch.setattr(checkout.git, "run", type_and_run)
    with pytest.raises(PolycomError, match=r"config\.py was changed meanwhile"):
        checkout.apply(small.pin, own)
    assert content(own) == before | {"small/config.py": b"typed\n"}


def test_files_that_patches_add_and_remove(small: Small, own: Path) -> None:
    small.set_series(
        {"small/config.py": (FILES["small/config.py"], "name = None\n"), "small/new/a.py": ("", "1\n")}
    )
    text = (small.series / "0001-Change-all.patch").read_text()
    empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    text = text.replace(f"index {empty}", f"new file mode 100644\nindex {'0' * 40}").replace(
        " 100644\n--- a/small/new/a.py", "\n--- /dev/null"
    )
    (small.series / "0001-Change-all.patch").write_text(text)
    before = content(own)
    checkout.apply(small.pin, own)
    assert content(own)["small/new/a.py"] == b"1\n"
    checkout.unapply(small.pin, own)
    assert content(own) == before


def test_the_series_becomes_commits_on_a_branch(own: Path, polycom: Polycom) -> None:
    """As `git am` would, by the patches' own author and date; the user's branch, edits and stage stay."""
    (own / "mine.py").write_text("mine = 2\n")
    git(own, "add", "mine.py")
    before, mine = content(own), git(own, "rev-parse", "mine")
    changes = git(own, "status", "--porcelain")
    assert polycom("apply", "--branch", "polycom") == 0
    assert content(own) == before | patched()
    assert git(own, "branch", "--show-current").strip() == "polycom"
    commits = git(own, "log", "--format=%an <%ae> %aI %s", "mine..polycom").splitlines()
    assert commits == [f"{IDENTITY[0]} <{IDENTITY[1]}> {DATE} Change {what}" for what in ("mlp", "config")]
    assert "Upstream-Status:" in git(own, "log", "-1", "--format=%b")
    assert (git(own, "rev-parse", "mine"), git(own, "status", "--porcelain")) == (mine, changes)
    assert git(own, "diff", "--name-only", "mine..polycom").split() == sorted(PATCHED)
    assert polycom("apply", "--branch", "polycom") == 0
    assert polycom("unapply") == 0
    assert content(own) == before
    assert git(own, "branch", "--show-current").strip() == "mine"
    assert git(own, "status", "--porcelain") == changes
    assert polycom("apply", "--branch", "polycom") == 0  # the branch is still there, as it was made
    git(own, "fsck", "--strict")


def test_a_user_at_a_tag_comes_back_to_it(own: Path, polycom: Polycom) -> None:
    git(own, "checkout", "--quiet", "--detach")
    commit = git(own, "rev-parse", "HEAD")
    assert polycom("apply", "--branch", "polycom") == 0
    assert polycom("unapply") == 0
    assert (git(own, "rev-parse", "HEAD"), git(own, "branch", "--show-current")) == (commit, "")


def test_what_was_applied_in_the_files_can_be_committed(own: Path, polycom: Polycom) -> None:
    assert polycom("apply") == 0
    git(own, "add", *PATCHED)
    assert polycom("apply", "--branch", "polycom") == 0
    assert git(own, "status", "--porcelain", *PATCHED) == ""


@pytest.mark.parametrize("how", ["more commits", "commits of the user's", "from another branch"])
def test_a_branch_that_is_not_as_it_was_made_is_the_users_to_leave(
    own: Path, polycom: Polycom, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "commits of the user's":
        git(own, "checkout", "--quiet", "-b", "polycom")
        polycom("apply")
        for name in PATCHED:
            git(own, "commit", "--quiet", "-m", "Patch", name)
    else:
        polycom("apply", "--branch", "polycom")
    if how == "more commits":
        git(own, "commit", "--quiet", "--all", "-m", "More of mine")
    if how == "from another branch":
        git(own, "checkout", "--quiet", "-b", "another", "mine~")
        git(own, "checkout", "--quiet", "polycom")
    before, known = content(own), of_git(own)
    assert polycom("unapply") == 2
    assert (
        "on polycom: `git switch` to a branch without them, or `git revert` them" in capsys.readouterr().err
    )
    assert polycom("status") == polycom("apply") == 0
    assert (content(own), of_git(own)) == (before, known)


@pytest.mark.parametrize(
    ("obstacle", "sentence"),
    [
        ("committed", "what is committed there of small/mlp.py is not upstream's"),
        ("staged", "of small/mlp.py is not ours"),
        ("another branch", "has a branch polycom already"),
        ("a branch in its place", "'refs/heads/polycom/more' exists"),
        ("in another working tree", "has a branch polycom already"),
        ("a merge", "in the middle of something"),
        ("git at work", "in the middle of something"),
        ("no repository", "not the top of a git checkout"),
    ],
)
def test_no_branch_is_made_where_that_is_not_safe(
    small: Small,
    own: Path,
    polycom: Polycom,
    obstacle: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if obstacle in ("committed", "staged"):
        file = own / "small" / "mlp.py"
        edit(file, "changed")
        git(own, "add", "small/mlp.py")
        if obstacle == "committed":
            git(own, "commit", "--quiet", "-m", "Edit")
        file.write_text(FILES["small/mlp.py"])
    elif obstacle == "another branch":
        git(own, "branch", "polycom")
    elif obstacle == "a branch in its place":
        git(own, "branch", "polycom/more")
    elif obstacle == "in another working tree":
        git(own, "worktree", "add", "--quiet", "--detach", "../another")
        checkout.apply(small.pin, own.with_name("another"), "polycom")
    elif obstacle == "no repository":
        shutil.rmtree(own / ".git")
    else:
        (own / ".git" / {"a merge": "MERGE_HEAD", "git at work": "index.lock"}[obstacle]).touch()
    before = content(own)
    assert polycom("apply", "--branch", "polycom") == 2
    assert sentence in capsys.readouterr().err
    assert content(own) == before
    if obstacle != "git at work":
        assert polycom("apply") == 0  # the files themselves are upstream's


@pytest.mark.parametrize("kind", ["working tree", "submodule", "partial and sparse"])
def test_other_kinds_of_checkouts(small: Small, own: Path, kind: str) -> None:
    """Where `.git` is a file that names another folder, and where most files are not there."""
    tree = small.folder / "another"
    if kind == "working tree":
        git(own, "worktree", "add", "--quiet", "--detach", str(tree))
    elif kind == "submodule":
        git(small.folder, "init", "--quiet", "another")
        url = (
            "-c",
            "protocol.file.allow=always",
            "submodule",
            "--quiet",
            "add",
            str(small.folder / "work"),
            "sub",
        )
        git(tree, *url)
        tree = make_mine(tree / "sub")
    else:
        git(small.folder / "work", "config", "uploadpack.allowFilter", "true")
        sparse = ("clone", "--quiet", "--filter=blob:none", "--sparse", f"file://{small.folder / 'work'}")
        git(small.folder, *sparse, str(tree))
        git(tree, "checkout", "--quiet", "HEAD~2")
        git(tree, "sparse-checkout", "set", "--no-cone", "/small/*.py")
        assert not (tree / "small" / "crlf.txt").exists()
    before, others, changes = content(tree), of_git(own)[:3], git(tree, "status", "--porcelain")
    for name in (None, "polycom"):
        assert checkout.apply(small.pin, tree, name).state is State.APPLIED
        assert content(tree) == before | patched()
        assert checkout.unapply(small.pin, tree).state is State.PRISTINE
        assert content(tree) == before
        assert git(tree, "status", "--porcelain") == changes
    assert of_git(own)[:3] == others
    git(tree, "fsck", "--strict", "--connectivity-only")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "--tree", "own"], "--tree is a checkout of one upstream"),
        (["apply", "small", "--branch", "b"], "name that with --tree"),
        (["apply", "small", "--tree", "nowhere"], "is no folder"),
        (["apply", "twin", "--tree", "own"], "twin has no patches"),
        (["apply", "small", "--tree", "own/small"], "has no small/config.py; give its top folder"),
        (["unapply", "small", "--tree", "trees/small"], "leave out --tree"),
        (["apply", "small", "--tree", "own", "--branch", "a..b"], "'a..b' is no name for a branch"),
    ],
)
def test_a_tree_that_cannot_be_meant_is_refused_in_a_sentence(
    small: Small,
    own: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small.tree.mkdir(parents=True)
    pinned = small.patches / "pins.toml"
    pinned.write_text(
        pinned.read_text()
        + '[twin]\nversion = "1"\norigin = "here"\n[twin.pypi]\nproject = "t"\nfiles = {}\n'
    )
    monkeypatch.chdir(small.folder)
    before = content(own)
    assert cli.main(["upstream", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert content(own) == before


def test_an_empty_tree_is_not_the_working_directory(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a shell's variable is not set."""
    monkeypatch.chdir(own)
    before = content(own)
    with pytest.raises(SystemExit):
        cli.main(["upstream", "apply", "small", "--tree", ""])
    assert content(own) == before
