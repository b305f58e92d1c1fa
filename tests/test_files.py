"""Files, hashes and locks: whatever the file system can do, and as the umask has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext.files import atomic, holders, lock, write_text

WITHOUT_FLOCK = """
import ctypes, platform, struct, sys
number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
program = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | %d), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *line) for line in program)
buffer = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)), 0, 0) == 0
"""
"""A process in which, by the kernel's own filter, flock fails with the given number."""


def run_without_flock(code: str, errno: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_FLOCK % errno + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("errno", [38, 95])
def test_every_lock_does_without_where_the_file_system_has_none_and_says_so_once(
    errno: int, tmp_path: Path
) -> None:
    code = """
import os
from pathlib import Path
from polycom_ext import files
from polycom_ext.runs.rundir import RunDirectory
from polycom_ext.upstream import fetch, pins
os.environ["POLYCOM_UPSTREAM_DIR"] = "trees"
with files.exclusive(Path("work")), RunDirectory(Path("run")).locked(), fetch.locked(pins.get("megatron")):
    print("worked")
"""
    finished = run_without_flock(code, errno, tmp_path)
    assert finished.stdout == "worked\n", finished.stderr
    assert finished.stderr.count("has no locks") == 1


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    finished = run_without_flock("from polycom_ext.files import lock; lock(open('f', 'wb'))", 5, tmp_path)
    assert "Input/output error" in finished.stderr.splitlines()[-1]


def test_a_lock_belongs_to_all_that_inherit_the_file_and_these_are_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        assert lock(file)
        child = subprocess.Popen(["sleep", "60"], stdout=file)
    try:
        assert holders(path) == [child.pid]
        with path.open("wb") as again:
            assert not lock(again)
    finally:
        child.kill()
        child.wait()
    with path.open("wb") as again:
        assert lock(again)


@pytest.mark.parametrize(("umask", "modes"), [(0o077, (0o600, 0o700)), (0o002, (0o664, 0o775))])
def test_files_honour_the_umask(umask: int, modes: tuple[int, int], tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "plain", "")
        write_text(tmp_path / "script", "", executable=True)
    finally:
        os.umask(before)
    assert tuple((tmp_path / name).stat().st_mode & 0o777 for name in ("plain", "script")) == modes


def test_two_processes_that_write_one_file_both_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic(path) as file:
        file.write(b"parent's")
        if (child := os.fork()) == 0:
            with atomic(path) as other:
                other.write(b"child's")
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() == b"child's"
    assert path.read_bytes() == b"parent's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing_and_keeps_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), atomic(tmp_path / "missing" / "file"):
        pass
    with pytest.raises(ValueError, match="closed"), atomic(tmp_path / "file") as file:
        file.close()
    assert list(tmp_path.iterdir()) == []
