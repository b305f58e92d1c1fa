"""Sources: hashes before anything is opened, archives that would leave their folder, caches, pins."""

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.errors import PolycomError
from polycom_ext.upstream import download, fetch, maintain, pins, trees
from polycom_ext.upstream.archive import unpack

from .conftest import FILES, WHEEL, Small, git, make_small, write_wheel


def test_a_wheel_with_another_hash_is_refused(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    write_wheel(small.cache / "pypi" / WHEEL, {**FILES, "small/mlp.py": "something else\n"})
    assert cli.main(["upstream", "apply", "small"]) == 2
    assert "sha256" in capsys.readouterr().err
    assert not small.tree.exists()
    assert [path.name for path in (small.folder / "trees").iterdir()] == [".small.lock"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside.py",
        "/outside.py",
        "small/../../outside.py",
        "C:/outside.py",
        ".git/config",
        "small/.GIT/config",
    ],
)
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_wheel(tmp_path / "bad.whl", {"small/first.py": "x\n", name: "x\n"})
    with pytest.raises(PolycomError, match=r"bad\.whl holds"):
        unpack(tmp_path / "bad.whl", tmp_path / "in" / "here")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_tar_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("small-1.0/link")
    member.type, member.linkname = kind, "../../outside"
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(PolycomError, match=r"small-1\.0/link"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["../outside.py", "/outside.py", "small-1.0/../../outside.py"])
def test_tar_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(PolycomError, match="leave its folder"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "in" / "here")
    assert not (tmp_path / "in").exists()


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr("small/a.py", "seen by one reader")
        with pytest.warns(UserWarning, match="Duplicate name"):
            wheel.writestr("small/a.py", "seen by another")
    with pytest.raises(PolycomError, match="twice"):
        unpack(tmp_path / "bad.whl", tmp_path / "here")


def test_a_source_archive_is_taken_without_its_folder(small: Small) -> None:
    archive = small.cache / "pypi" / "small-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(small.folder / "work" / "small", "small-1.0/small")
        script = tarfile.TarInfo("small-1.0/run.sh")
        script.mode = 0o755
        made.addfile(script)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    (small.patches / "pins.toml").write_text(
        f'[small]\nversion = "1.0"\norigin = "here"\n[small.pypi]\nproject = "small"\n'
        f'files."small-1.0.tar.gz" = "{sha256}"\n'
    )
    fetch.fetch(small.pin)
    assert sorted(path.name for path in small.tree.iterdir()) == [".git", "run.sh", "small"]
    assert git(small.tree, "ls-tree", "HEAD", "run.sh").startswith("100755")


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("small/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr(link, "/etc")
    with pytest.raises(PolycomError, match="small/link"):
        unpack(tmp_path / "bad.whl", tmp_path / "here")


def test_a_tree_of_another_version_is_left_alone(small: Small) -> None:
    fetch.fetch(small.pin)
    text = (small.patches / "pins.toml").read_text()
    (small.patches / "pins.toml").write_text(text.replace('"1.0"', '"1.1"'))
    with pytest.raises(PolycomError, match=r"is not small 1\.1"):
        fetch.fetch(small.pin)


def test_git_source_takes_only_the_wanted_paths_and_works_offline(small: Small) -> None:
    origin = small.folder / "work"
    (origin / "unwanted").mkdir()
    (origin / "unwanted" / "big").write_text("x")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "more")
    small.take_from_git()
    fetch.fetch(small.pin)
    assert sorted(path.name for path in small.tree.iterdir()) == [".git", "small"]
    assert trees.status(small.pin).state is trees.State.APPLIED
    origin.rename(small.folder / "gone")
    subprocess.run(["rm", "-r", str(small.tree)], check=True)
    fetch.fetch(small.pin)
    assert (small.tree / "small" / "mlp.py").exists()
    assert maintain.verify(small.pin) == []


def test_a_git_source_keeps_its_bytes(small: Small) -> None:
    """Whatever its own .gitattributes say about line ends and expansion."""
    origin = small.folder / "work"
    (origin / "small" / ".gitattributes").write_text("*.py eol=crlf\nid.txt ident\n")
    (origin / "small" / "id.txt").write_text("$Id$\n")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "attributes")
    small.take_from_git()
    fetch.fetch(small.pin)
    assert git(small.tree, "rev-parse", "HEAD:small") == git(origin, "rev-parse", "HEAD:small")
    assert (small.tree / "small" / "id.txt").read_text() == "$Id$\n"
    assert (small.tree / "small" / "config.py").read_bytes() == b"name = 'gelu'\nextra = None\n"


def test_a_link_in_a_git_source_is_refused(small: Small) -> None:
    (small.folder / "work" / "small" / "link").symlink_to("../../outside")
    git(small.folder / "work", "add", ".")
    git(small.folder / "work", "commit", "--quiet", "-m", "link")
    small.take_from_git()
    with pytest.raises(PolycomError, match="small/link"):
        fetch.fetch(small.pin)
    assert not small.tree.exists()


def test_a_damaged_clone_in_the_cache_is_noticed(small: Small) -> None:
    origin = small.take_from_git()
    fetch.fetch(small.pin)
    shutil.rmtree(small.tree)
    clone = next((small.cache / "git").iterdir())
    for pack in list((clone / "objects" / "pack").glob("*.pack")):
        for path in (clone / "objects" / "pack").glob(f"{pack.stem}.*"):
            shutil.move(path, small.folder / path.name)
        with (small.folder / pack.name).open("rb") as file:
            subprocess.run(["git", "-C", str(clone), "unpack-objects", "-q"], stdin=file, check=True)
    blob = git(origin, "rev-parse", "HEAD:small/mlp.py").strip()
    loose = clone / "objects" / blob[:2] / blob[2:]
    loose.chmod(0o644)
    loose.write_bytes(zlib.compress(b"blob 5\0evil\n"))
    with pytest.raises(PolycomError, match="is damaged"):
        fetch.fetch(small.pin)
    assert not small.tree.exists()


def test_fetches_at_the_same_time_make_one_tree(small: Small) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert {task.result() for task in [pool.submit(fetch.fetch, small.pin) for _ in range(4)]} == {
            small.tree
        }
    assert trees.status(small.pin).state is trees.State.PRISTINE


def test_two_checkouts_may_fill_one_cache_at_the_same_time(small: Small) -> None:
    small.take_from_git()
    places = [small.folder / str(n) for n in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for task in [pool.submit(fetch.build, small.pin, place) for place in places]:
            task.result()
    assert len(list((small.cache / "git").iterdir())) == 1


def test_what_a_killed_fetch_leaves_is_cleared(small: Small) -> None:
    left = small.folder / "trees" / ".small.scratch-abc"
    left.mkdir(parents=True)
    fetch.fetch(small.pin)
    assert not left.exists()


def test_a_wheel_for_another_python_stands_in_for_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pins.get("megatron").source
    assert isinstance(source, pins.Release)
    nearest = {10: "cp311", 11: "cp311", 12: "cp312", 13: "cp313", 14: "cp313"}
    for (version, tag), machine in product(nearest.items(), ("x86_64", "aarch64")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(sys, "version_info", (3, version))
        assert f"-{tag}-" in source.choose()
        assert source.choose().endswith(f"{machine}.whl")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(PolycomError, match="no wheel of megatron-core is pinned for riscv64"):
        source.choose()


def test_a_download_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolycomError, match="cannot download six-1"):
        download.from_pypi("six", "1.17.0", "six-1.17.0-py2.py3-none-any.whl", "0" * 64, cache=tmp_path)
    assert list((tmp_path / "pypi").iterdir()) == []


NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
as_another = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can run something as nobody"
)


@pytest.fixture
def open_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    """`small` where everybody may read it: pytest's own folders are for their owner only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield make_small(Path(folder), monkeypatch)


def fetch_as_nobody(small: Small, home: Path | None, cache: Path | None) -> subprocess.CompletedProcess[str]:
    """Fetch from git as a user without an entry in passwd, who may write trees and temporary files."""
    origin = small.take_from_git()
    places = (small.folder / "trees", small.folder / "temporary")
    for place in places:
        place.mkdir()
    for path in (*places, *[path for top in (small.patches, origin) for path in (top, *top.rglob("*"))]):
        os.chown(path, 12345, 12345)
    environment = {**os.environ, "TMPDIR": str(places[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in (("HOME", home), ("POLYCOM_CACHE", cache)):
        environment.pop(name, None)
        if value is not None:
            environment[name] = str(value)
    command = [*NOBODY, sys.executable, "-m", "polycom_ext.cli", "upstream", "apply", "small"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@as_another
@pytest.mark.parametrize("home", ["none", "unwritable", "a file", "cache is a file"])
def test_a_user_without_a_home_can_fetch(open_small: Small, home: str) -> None:
    folder = open_small.folder / "home"
    if home == "a file":
        folder.touch()
    else:
        folder.mkdir()
    if home == "cache is a file":
        os.chown(folder, 12345, 12345)
        (folder / ".cache").touch()
    finished = fetch_as_nobody(open_small, None if home == "none" else folder, None)
    assert finished.returncode == 0, finished.stderr
    assert "small" in finished.stdout
    kept = open_small.folder / "temporary" / "polycom-cache-12345"
    assert len(list((kept / "git").iterdir())) == 1
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@as_another
@pytest.mark.parametrize("cache", ["unwritable", "a file", "below a file"])
def test_a_cache_that_cannot_be_written_is_one_sentence(open_small: Small, cache: str) -> None:
    folder = open_small.folder / "mine"
    if cache == "unwritable":
        folder.mkdir()
    else:
        folder.touch()
    finished = fetch_as_nobody(open_small, None, folder / "deeper" if cache == "below a file" else folder)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert "set POLYCOM_CACHE to a folder that can be written" in finished.stderr
    assert not open_small.tree.exists()


def test_somebody_elses_temporary_folder_is_no_cache(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYCOM_CACHE")
    monkeypatch.setenv("HOME", "/proc/1/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(small.folder))
    (small.folder / f"polycom-cache-{os.getuid()}").symlink_to("/etc")
    with pytest.raises(PolycomError, match="somebody else's; set POLYCOM_CACHE"):
        download.cache_dir()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("version", "versions"), "unknown keys: versions"),
        (('version = "1.0"', "version = 1.0"), "version must be a str"),
        (("[small.pypi]", "[small.pyp]"), "unknown keys: pyp"),
        (('project = "small"', 'projects = "small"'), "unknown keys: projects"),
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
        (("Inappropriate [a test]", "Inappropriate"), "Upstream-Status other than"),
        (("From: PolyCom <", "From: Somebody <"), "is not from PolyCom"),
    ],
)
def test_verify_checks_headers(small: Small, edit: tuple[str, str], message: str) -> None:
    path = sorted(small.series.glob("*.patch"))[0]
    path.write_text(path.read_text().replace(*edit))
    assert any(message in problem for problem in maintain.verify(small.pin))


def test_verify_checks_series_against_files_both_ways(small: Small) -> None:
    assert maintain.verify(small.pin) == []
    series = small.series / "series"
    names = series.read_text().splitlines()
    series.write_text(names[0] + "\n")
    assert maintain.verify(small.pin) == [f"{names[1]} is not in series"]
    series.write_text("\n".join([*names, names[0], "0003-none.patch"]))
    assert maintain.verify(small.pin) == [
        "0003-none.patch is in series, but there is no such file",
        f"series names {names[0]} twice",
    ]
    assert cli.main(["upstream", "verify", "small"]) == 1
    with pytest.raises(PolycomError, match=r"0003-none\.patch is missing"):
        trees.status(small.pin)


def test_short_blob_ids_are_refused(small: Small) -> None:
    path = sorted(small.series.glob("*.patch"))[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join("index 1234567..89abcde 100644\n" if line.startswith("index ") else line for line in lines)
    )
    assert "whole blob ids" in maintain.verify(small.pin)[0]
