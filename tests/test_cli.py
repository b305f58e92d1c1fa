"""The door: help, errors, exit statuses."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from polycom_ext import cli
from polycom_ext.errors import MissingDependencyError, PolycomError, needing


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"polycom {verb}" in capsys.readouterr().out


FAST = (
    ["--help"],
    *([verb, "--help"] for verb in cli.VERBS if verb != "report"),
    ["upstream", "list"],
    ["run", "configs/tiny/dense.yaml", "--dry-run"],
    ["run", "configs/tiny/olmo-moe.yaml", "--dry-run"],
)


@pytest.mark.parametrize("arguments", FAST, ids=" ".join)
def test_a_door_opens_without_torch(arguments: list[str]) -> None:
    """Importing torch takes two seconds. What a door takes is in the output, for `pytest -rP`."""
    script = (
        "import contextlib, sys, time; from polycom_ext.cli import main\n"
        "with contextlib.suppress(SystemExit): main(sys.argv[1:])\n"
        "print('torch' in sys.modules, round(time.process_time(), 2))"
    )
    top = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=top).stdout
    imported, seconds = told.splitlines()[-1].split()
    print(f"{seconds} s of processor time")
    assert imported == "False"


def test_no_verb_and_an_unknown_verb_exit_with_2() -> None:
    for arguments in ([], ["rum"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2


def test_an_error_is_one_sentence_on_stderr() -> None:
    command = [sys.executable, "-m", "polycom_ext.cli", "run", "no-such-file.yaml"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(finished.stderr.strip().splitlines()) == 1
    assert "no-such-file.yaml" in finished.stderr


@pytest.mark.parametrize("verb", [["run", "x.yaml"], ["report", "x"], ["data", "corpus", "shakespeare"]])
def test_no_verb_writes_into_the_root_folder_or_nowhere(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for output, sentence in (("", "it is empty"), ("/", "/ is the root folder")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*verb, "--output", output])
        assert exit_.value.code == 2
        assert f"argument --output: {sentence}" in capsys.readouterr().err


def test_an_error_of_the_system_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    prepare = ["data", "prepare", str(tmp_path / "x.jsonl"), "--train-tokenizer", "300", "--output"]
    for command, sentence in (
        ([*prepare, "/proc/x"], "polycom data: /proc/x.work: No such file or directory\n"),
        (["data", "corpus", "shakespeare", "--output", "/proc/x"], "polycom data: /proc/x: No such file"),
    ):
        assert cli.main(command) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture
def no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for one again, and only where even root can write nothing."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    monkeypatch.delenv("POLYCOM_CACHE", raising=False)


NO_PLACE = (
    "No usable temporary directory found in ['/proc/nowhere']; set TMPDIR to a folder that can be written"
)


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_user_without_a_home_or_a_place_for_temporary_files_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # which is in no passwd
    assert cli.main(["upstream", "list"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"polycom: {NO_PLACE}\n")


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_verb_that_needs_a_place_for_temporary_files_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")  # so that downloads would be kept there
    assert cli.main(["data", "corpus", "shakespeare", "--output", str(tmp_path / "texts")]) == 2
    assert capsys.readouterr().err == f"polycom data: {NO_PLACE}\n"
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it() -> None:
    """And a module of a package that is there, or a name in one, is no such case."""
    said = r"^tea needs no_cup: pip install 'polycom-ext\[data\]'$"
    with pytest.raises(MissingDependencyError, match=said), needing("tea needs", "data"):
        exec("import no_cup")
    for statement in ("import json.no_such_part", "from json import no_such_name"):
        with pytest.raises(ImportError) as raised, needing("tea needs", "data"):
            exec(statement)
        assert not isinstance(raised.value, PolycomError)
