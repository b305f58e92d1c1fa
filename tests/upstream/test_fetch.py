"""Sources: hashes before anything is opened, archives that would leave their folder, caches, pins."""

import stat
import subprocess
import zipfile
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import download, fetch, pins, trees

from .conftest import FILES, WHEEL, Small, git, write_wheel


def test_a_wheel_with_another_hash_is_refused(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    write_wheel(small.cache / "pypi" / WHEEL, {**FILES, "small/mlp.py": "something else\n"})
    assert cli.main(["upstream", "apply", "small"]) == 2
    assert "sha256" in capsys.readouterr().err
    assert not small.tree.exists()
    assert list((small.folder / "trees").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../outside.py", "/outside.py", "small/../../outside.py", "C:/outside.py", ".git/config"]
)
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_wheel(tmp_path / "bad.whl", {"small/first.py": "x\n", name: "x\n"})
    with pytest.raises(PolycomError, match=r"bad\.whl holds"):
        fetch.unpack(tmp_path / "bad.whl", tmp_path / "in" / "here")
    assert not (tmp_path / "in").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("small/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr(link, "/etc")
    with pytest.raises(PolycomError, match="small/link"):
        fetch.unpack(tmp_path / "bad.whl", tmp_path / "here")


def test_a_tree_of_another_version_is_left_alone(small: Small) -> None:
    fetch.fetch(small.pin)
    text = (small.patches / "pins.toml").read_text()
    (small.patches / "pins.toml").write_text(text.replace('"1.0"', '"1.1"'))
    with pytest.raises(PolycomError, match=r"is not small 1\.1"):
        fetch.fetch(small.pin)


def test_git_source_takes_only_the_wanted_paths_and_works_offline(small: Small) -> None:
    origin = small.folder / "work"
    git(origin, "config", "uploadpack.allowFilter", "true")
    git(origin, "config", "uploadpack.allowAnySHA1InWant", "true")
    (origin / "unwanted").mkdir()
    (origin / "unwanted" / "big").write_text("x")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "more")
    commit = git(origin, "rev-parse", "HEAD").strip()
    (small.patches / "pins.toml").write_text(
        f'[small]\nversion = "{commit[:8]}"\norigin = "here"\n'
        f'[small.git]\nurl = "file://{origin}"\ncommit = "{commit}"\npaths = ["small"]\n'
    )
    fetch.fetch(small.pin)
    assert sorted(path.name for path in small.tree.iterdir()) == [".git", "small"]
    assert trees.status(small.pin).state is trees.State.APPLIED
    origin.rename(small.folder / "gone")
    subprocess.run(["rm", "-r", str(small.tree)], check=True)
    fetch.fetch(small.pin)
    assert (small.tree / "small" / "mlp.py").exists()
    assert trees.verify(small.pin) == []


def test_a_download_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match="cannot download six-1"):
        download.from_pypi("six", "1.17.0", "six-1.17.0-py2.py3-none-any.whl", "0" * 64, cache=tmp_path)
    assert list((tmp_path / "pypi").iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("version", "versions"), "unknown keys: versions"),
        (("[small.wheel]", "[small.whee]"), "unknown keys: whee"),
        (('project = "small"', 'projects = "small"'), "not complete"),
        (('series = "small"\n', 'series = "small\n'), "not valid TOML"),
    ],
)
def test_pins_that_are_wrong_are_named(small: Small, edit: tuple[str, str], message: str) -> None:
    path = small.patches / "pins.toml"
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(PolycomError, match=message):
        pins.load()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("Origin: here\n", ""), "no Origin"),
        (("Upstream-Status: Inappropriate [a test]\n", ""), "no Upstream-Status"),
        (("It is needed.\n", ""), "does not say why"),
    ],
)
def test_verify_checks_headers(small: Small, edit: tuple[str, str], message: str) -> None:
    path = sorted(small.series.glob("*.patch"))[0]
    path.write_text(path.read_text().replace(*edit))
    assert any(message in problem for problem in trees.verify(small.pin))


def test_verify_checks_series_against_files_both_ways(small: Small) -> None:
    assert trees.verify(small.pin) == []
    series = small.series / "series"
    names = series.read_text().splitlines()
    series.write_text(names[0] + "\n")
    assert trees.verify(small.pin) == [f"{names[1]} is not in series"]
    series.write_text("\n".join([*names, "0003-none.patch"]))
    with pytest.raises(PolycomError, match=r"0003-none\.patch is missing"):
        trees.verify(small.pin)


def test_short_blob_ids_are_refused(small: Small) -> None:
    path = sorted(small.series.glob("*.patch"))[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join("index 1234567..89abcde 100644\n" if line.startswith("index ") else line for line in lines)
    )
    with pytest.raises(PolycomError, match="whole blob ids"):
        trees.verify(small.pin)
