"""Every state of a tree, and every way between them, on a small upstream."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, maintain, trees
from polycom_ext.upstream import git as ours
from polycom_ext.upstream.trees import State

from .conftest import FILES, PATCHED, Small, git


def content(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def test_fetch_commits_upstream_as_it_was(small: Small) -> None:
    fetch.fetch(small.pin)
    assert content(small.tree) == {name: text.encode() for name, text in FILES.items()}
    assert git(small.tree, "rev-list", "--count", "HEAD").strip() == "1"
    assert trees.status(small.pin).state is State.PRISTINE


def test_apply_and_unapply_round_trip(small: Small) -> None:
    fetch.fetch(small.pin)
    before = content(small.tree)
    assert trees.apply(small.pin).state is State.APPLIED
    changed = {name for name, data in content(small.tree).items() if data != before[name]}
    assert changed == set(PATCHED)
    assert trees.unapply(small.pin).state is State.PRISTINE
    assert content(small.tree) == before


def test_apply_again_does_nothing(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    head = git(small.tree, "rev-parse", "HEAD")
    times = {path: path.stat().st_mtime_ns for path in (small.tree / "small").iterdir()}
    trees.apply(small.pin)
    assert git(small.tree, "rev-parse", "HEAD") == head
    assert {path: path.stat().st_mtime_ns for path in (small.tree / "small").iterdir()} == times


def test_commit_ids_do_not_depend_on_who_applies(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    first = git(small.tree, "rev-parse", "HEAD")
    monkeypatch.setenv("POLYCOM_UPSTREAM_DIR", str(small.folder / "again"))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody Else")
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    assert git(small.folder / "again" / "small", "rev-parse", "HEAD") == first


@pytest.mark.parametrize(
    "edit",
    [
        "patched file",
        "other file",
        "new file",
        "ignored file",
        "deleted file",
        "mode",
        "staged",
        "only staged",
        "committed",
    ],
)
def test_foreign_edits_are_named_and_nothing_changes(
    small: Small, edit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small.set_upstream({**FILES, ".gitignore": "ignored*.py\n"})
    fetch.fetch(small.pin)
    names = {"patched file": "small/mlp.py", "new file": "small/new.py", "ignored file": "small/ignored.py"}
    name = names.get(edit, "small/__init__.py")
    if edit == "deleted file":
        (small.tree / name).unlink()
    elif edit == "mode":
        (small.tree / name).chmod(0o755)
    else:
        with (small.tree / name).open("ab") as file:
            file.write(b"#")
    if "staged" in edit:
        git(small.tree, "add", name)
    if edit == "only staged":
        (small.tree / name).write_text(FILES[name])
    if edit == "committed":
        git(small.tree, "commit", "--quiet", "--all", "-m", "mine")
    before, head = content(small.tree), state_of_git(small.tree)
    assert cli.main(["upstream", "apply", "small"]) == 2
    assert name in capsys.readouterr().err
    assert (content(small.tree), state_of_git(small.tree)) == (before, head)
    assert cli.main(["upstream", "status", "small"]) == State.DRIFTED.exit_status
    assert cli.main(["upstream", "unapply", "small"]) == 2
    assert content(small.tree) == before


def state_of_git(tree: Path) -> tuple[str, str]:
    return git(tree, "rev-parse", "HEAD"), git(tree, "ls-files", "--stage")


def test_files_made_by_use_are_not_foreign(small: Small) -> None:
    fetch.fetch(small.pin)
    (small.tree / "small" / "__pycache__").mkdir()
    (small.tree / "small" / "__pycache__" / "mlp.cpython-311.pyc").write_bytes(b"x")
    assert trees.apply(small.pin).state is State.APPLIED
    assert ours.output(small.tree, "status", "--porcelain") == ""


def test_partly_applied_is_told_and_finished(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    whole = content(small.tree)
    (small.tree / "small" / "mlp.py").write_text(FILES["small/mlp.py"])
    assert cli.main(["upstream", "status", "small", "--json"]) == State.PARTLY.exit_status
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "partly applied"
    assert told["patched"] == ["small/config.py"]
    assert told["unpatched"] == ["small/mlp.py"]
    assert trees.apply(small.pin).state is State.APPLIED
    assert content(small.tree) == whole


def test_a_killed_apply_can_be_finished(small: Small) -> None:
    """Kill `apply` while git replaces files: the tree is never drifted, and applying again ends well."""
    before = {f"small/{n}.txt": "before\n" * 10_000 for n in range(40)}
    after = {name: text.replace("before", "after", 100) for name, text in before.items()}
    small.set_upstream({**FILES, **before})
    small.set_series({name: (before[name], after[name]) for name in before})
    fetch.fetch(small.pin)
    files = [small.tree / name for name in before]
    sizes = {path: path.stat().st_size for path in files}
    for attempt in range(12):
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from polycom_ext.upstream import pins, trees; trees.apply(pins.get('small'))",
            ],
            start_new_session=True,
        )
        while child.poll() is None and size(files[attempt]) == sizes[files[attempt]]:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if trees.status(small.pin).state is State.PARTLY:
            break
        trees.unapply(small.pin)
    else:
        pytest.fail("no kill hit the moment")
    assert trees.apply(small.pin).state is State.APPLIED
    assert {name: (small.tree / name).read_text() for name in after} == after
    assert trees.unapply(small.pin).state is State.PRISTINE


def size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("left", [None, "", "line 0\nline 1\nli"])
@pytest.mark.parametrize("verb", ["apply", "unapply"])
def test_a_file_that_was_being_replaced_when_git_died_is_ours(
    small: Small, left: str | None, verb: str
) -> None:
    """What a kill leaves between unlink, first write and last write: rebuilt, to hit each for sure."""
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    if verb == "apply":
        trees.unapply(small.pin)
    target = (
        git(small.tree, "rev-list", "--max-parents=0", "HEAD")
        if verb == "unapply"
        else "refs/polycom/applied"
    )
    git(small.tree, "update-ref", "refs/polycom/moving", target.strip())
    (small.tree / ".git" / "index.lock").touch()
    file = small.tree / "small" / "mlp.py"
    file.unlink()
    if left is not None:
        file.write_text(left)
    assert trees.status(small.pin).state is State.PARTLY
    assert trees.apply(small.pin).state is State.APPLIED
    assert not git(small.tree, "status", "--porcelain")
    file.unlink()
    with pytest.raises(PolycomError, match=r"small/mlp\.py"):
        trees.apply(small.pin)  # no longer excused once nothing is under way


def test_an_edit_during_an_interruption_is_still_foreign(small: Small) -> None:
    fetch.fetch(small.pin)
    git(small.tree, "update-ref", "refs/polycom/moving", "HEAD")
    (small.tree / "small" / "config.py").write_text("mine\n")
    with pytest.raises(PolycomError, match=r"small/config\.py"):
        trees.apply(small.pin)


def test_status_and_applying_again_write_nothing(small: Small) -> None:
    """A tree in an image belongs to somebody else, or is mounted read-only."""
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    before = marks(small.tree)
    trees.status(small.pin)
    trees.apply(small.pin)
    assert marks(small.tree) == before


def marks(tree: Path) -> dict[Path, int]:
    """Of everything but objects, whose times git renews where it may when it would have made them again."""
    return {path: "objects" not in path.parts and path.stat().st_mtime_ns for path in tree.rglob("*")}


def test_blob_ids_are_checked_whatever_the_path(small: Small) -> None:
    """A context that fits at another line is no reason to patch another file than the recorded one."""
    text = "".join(f"line {n}\n" for n in range(40))
    small.set_upstream({**FILES, "small/a b.txt": f"one line more\n{text}"})
    small.set_series({"small/a b.txt": (text, text.replace("line 20", "line twenty"))})
    fetch.fetch(small.pin)
    before = content(small.tree)
    with pytest.raises(PolycomError, match=r"made for another version of small/a b\.txt"):
        trees.apply(small.pin)
    assert content(small.tree) == before


def test_a_tree_of_another_pin_is_drifted(small: Small) -> None:
    fetch.fetch(small.pin)
    small.set_upstream({**FILES, "small/config.py": "name = 'relu'\n"})
    assert trees.status(small.pin).state is State.DRIFTED
    with pytest.raises(PolycomError, match="as it is pinned"):
        trees.apply(small.pin)


def test_the_users_git_settings_do_not_matter(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = small.folder / "template" / "hooks"
    hooks.mkdir(parents=True)
    for name in ("pre-commit", "post-checkout", "reference-transaction"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    (small.folder / "ignore").write_text("new.py\n")
    (small.folder / ".gitconfig").write_text(
        f"[init]\n\ttemplateDir = {hooks.parent}\n[core]\n\thooksPath = {hooks}\n\tautocrlf = true\n"
        f"\texcludesFile = {small.folder / 'ignore'}\n[diff]\n\tnoprefix = true\n\tcontext = 1\n"
        "[commit]\n\tgpgSign = true\n[gpg]\n\tprogram = false\n[format]\n\tsignOff = true\n"
    )
    monkeypatch.setenv("HOME", str(small.folder))
    monkeypatch.setenv("GIT_DIR", str(small.folder / "nowhere"))
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    before = content(small.series)
    maintain.refresh(small.pin)
    assert content(small.series) == before
    assert trees.unapply(small.pin).state is State.PRISTINE
    assert content(small.tree) == {name: text.encode() for name, text in FILES.items()}
    (small.tree / "small" / "new.py").touch()
    assert trees.status(small.pin).foreign == ("small/new.py",)


def test_a_patch_that_does_not_fit_changes_nothing(small: Small) -> None:
    fetch.fetch(small.pin)
    second = sorted(small.series.glob("*.patch"))[1]
    second.write_text(second.read_text().replace("-line 3\n", "-line 4\n"))
    before = content(small.tree)
    with pytest.raises(PolycomError, match=r"0002-Change-mlp\.patch"):
        trees.apply(small.pin)
    assert content(small.tree) == before


def test_an_older_series_gives_way_to_the_new_one(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    names = (small.series / "series").read_text().splitlines()
    (small.series / names[1]).unlink()
    (small.series / "series").write_text(names[0] + "\n")
    assert trees.status(small.pin).state is State.PARTLY
    assert trees.apply(small.pin).state is State.APPLIED
    assert (small.tree / "small" / "mlp.py").read_text() == FILES["small/mlp.py"]


def test_refresh_right_after_apply_changes_no_byte(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    before = content(small.series)
    maintain.refresh(small.pin)
    assert content(small.series) == before


def test_refresh_writes_new_commits_back(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    (small.tree / "small" / "config.py").write_text("name = 'silu'\n")
    with pytest.raises(PolycomError, match=r"small/config\.py"):
        maintain.refresh(small.pin)
    why = "Because.\n\nOrigin: here\nUpstream-Status: Pending"
    git(small.tree, "commit", "--quiet", "--all", "-m", "Use silu", "-m", why)
    written = maintain.refresh(small.pin)
    assert written[2].name == "0003-Use-silu.patch"
    assert "\nFrom: PolyCom <polycom@users.noreply.github.com>\n" in written[2].read_text()
    assert trees.status(small.pin).state is State.APPLIED
    assert maintain.verify(small.pin) == []


def test_refresh_keeps_comments_and_drops_patches_that_are_gone(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    names = (small.series / "series").read_text()
    (small.series / "series").write_text(f"# in this order\n{names}")
    git(small.tree, "reset", "--quiet", "--hard", "HEAD~1")
    first = names.splitlines()[0]
    assert [path.name for path in maintain.refresh(small.pin)] == [first]
    assert sorted(path.name for path in small.series.iterdir()) == [first, "series"]
    assert (small.series / "series").read_text() == f"# in this order\n{first}\n"


def test_several_names_at_once(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    path = small.patches / "pins.toml"
    path.write_text(path.read_text() + path.read_text().replace("[small", "[twin"))
    assert cli.main(["upstream", "apply", "small"]) == 0
    capsys.readouterr()
    assert cli.main(["upstream", "status", "--json"]) == State.ABSENT.exit_status
    assert [found["state"] for found in json.loads(capsys.readouterr().out)] == ["applied", "absent"]
    assert cli.main(["upstream", "verify"]) == 0
    assert cli.main(["upstream", "list"]) == 0


def test_absent(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["upstream", "status", "small"]) == State.ABSENT.exit_status
    assert cli.main(["upstream", "unapply", "small"]) == 2
    assert cli.main(["upstream", "status", "other"]) == 2
    assert "unknown upstream 'other'" in capsys.readouterr().err
