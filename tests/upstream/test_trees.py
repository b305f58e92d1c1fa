"""Every state of a tree, and every way between them, on a small upstream."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import fetch, trees
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
    "edit", ["patched file", "other file", "new file", "deleted file", "staged", "committed"]
)
def test_foreign_edits_are_named_and_nothing_changes(
    small: Small, edit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch.fetch(small.pin)
    name = {"patched file": "small/mlp.py", "new file": "small/new.py"}.get(edit, "small/__init__.py")
    if edit == "deleted file":
        (small.tree / name).unlink()
    else:
        with (small.tree / name).open("ab") as file:
            file.write(b"#")
    if edit == "staged":
        git(small.tree, "add", name)
    if edit == "committed":
        git(small.tree, "commit", "--quiet", "--all", "-m", "mine")
    before, head = content(small.tree), git(small.tree, "rev-parse", "HEAD")
    assert cli.main(["upstream", "apply", "small"]) == 2
    assert name in capsys.readouterr().err
    assert (content(small.tree), git(small.tree, "rev-parse", "HEAD")) == (before, head)
    assert cli.main(["upstream", "status", "small"]) == State.DRIFTED.exit_status
    assert cli.main(["upstream", "unapply", "small"]) == 2
    assert content(small.tree) == before


def test_files_made_by_use_are_not_foreign(small: Small) -> None:
    fetch.fetch(small.pin)
    (small.tree / "small" / "__pycache__").mkdir()
    (small.tree / "small" / "__pycache__" / "mlp.cpython-311.pyc").write_bytes(b"x")
    assert trees.apply(small.pin).state is State.APPLIED


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
    """Kill `apply` at many moments: the tree is never drifted, and applying again always ends well."""
    fetch.fetch(small.pin)
    for delay in (0.05, 0.15, 0.2, 0.25, 0.3):
        child = subprocess.Popen(
            [sys.executable, "-m", "polycom_ext.cli", "upstream", "apply", "small"], start_new_session=True
        )
        time.sleep(delay)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert trees.status(small.pin).state is not State.DRIFTED
    assert trees.apply(small.pin).state is State.APPLIED
    assert trees.unapply(small.pin).state is State.PRISTINE


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
    trees.refresh(small.pin)
    assert content(small.series) == before


def test_refresh_writes_new_commits_back(small: Small) -> None:
    fetch.fetch(small.pin)
    trees.apply(small.pin)
    (small.tree / "small" / "config.py").write_text("name = 'silu'\n")
    with pytest.raises(PolycomError, match=r"small/config\.py"):
        trees.refresh(small.pin)
    why = "Because.\n\nOrigin: here\nUpstream-Status: Pending"
    git(small.tree, "commit", "--quiet", "--all", "-m", "Use silu", "-m", why)
    assert [path.name for path in trees.refresh(small.pin)][2] == "0003-Use-silu.patch"
    assert trees.status(small.pin).state is State.APPLIED
    assert trees.verify(small.pin) == []


def test_absent(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["upstream", "status", "small"]) == State.ABSENT.exit_status
    assert cli.main(["upstream", "unapply", "small"]) == 2
    assert cli.main(["upstream", "status", "other"]) == 2
    assert "unknown upstream 'other'" in capsys.readouterr().err
