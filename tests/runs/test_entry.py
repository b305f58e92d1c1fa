"""A trainer's entry says in the run's record why it will not train."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext.runs import entry
from polycom_ext.runs.record import Record


def test_a_refusal_is_one_line_in_the_record_and_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(entry.RUN_DIR, str(tmp_path))
    entry.refuse("it cannot\n be  right")
    entry.refuse("nor can this")
    assert Record(tmp_path).read_refusal() == "it cannot be right", "the first one's"
    assert capfd.readouterr().err.splitlines()[0] == "polycom: error: it cannot be right"


def test_what_any_parser_refuses_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(entry.RUN_DIR, str(tmp_path))
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)
    entry.note_what_argparse_refuses()
    with pytest.raises(SystemExit) as exit_:
        argparse.ArgumentParser(prog="upstream").parse_args(["--stepz"])
    assert exit_.value.code == 2
    assert Record(tmp_path).read_refusal() == "unrecognized arguments: --stepz"
    assert "upstream: error: unrecognized arguments: --stepz" in capfd.readouterr().err


def test_a_worker_of_no_run_only_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(entry.RUN_DIR, raising=False)
    monkeypatch.chdir(tmp_path)
    entry.refuse("it cannot be right")
    assert capfd.readouterr().err == "polycom: error: it cannot be right\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["RuntimeError", "BaseException", "SystemExit(1)"])
def test_whatever_is_raised_on_a_full_disk_ends_a_worker_as_a_full_disk_does(
    small_disk: Path, error: str
) -> None:
    """torch's CheckpointException is no Exception."""
    code = f"from polycom_ext.runs import entry\nwith entry.watching_the_disk(): raise {error}"
    others = small_disk / "others"
    for full in (True, False):
        if full:
            with pytest.raises(OSError, match="No space left"):
                others.write_bytes(bytes(3 << 20))
        else:
            others.unlink()
        worker = [sys.executable, "-c", code]
        environment = {**os.environ, entry.RUN_DIR: str(small_disk)}
        status = subprocess.run(worker, env=environment, capture_output=True, check=False).returncode
        assert (status == entry.DISK_FULL) is full
