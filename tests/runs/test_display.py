"""A terminal, pipe or file that takes no more output ends nothing but the display."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = Path("outputs/small")


def finished_step() -> int:
    assert json.loads((RUN / "versions.json").read_text())["attempts"][-1]["status"] == 0
    return int((RUN / "checkpoints" / "step").read_text())


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """As a user types it; the status of a pipe is that of its first command."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LOST = "polycom: standard output: No space left on device; a part of it is lost\n"


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("2>&1 | head -1", ""),
        ("> /dev/full", LOST),
        pytest.param("> /dev/full 2>&1", "", marks=pytest.mark.full),
        pytest.param(">&- 2>&-", "", marks=pytest.mark.full),
    ],
)
def test_a_run_whose_output_goes_nowhere_trains_to_the_end(
    toy_spec: Callable[..., str], polycom: list[str], redirection: str, said: str
) -> None:
    spec = toy_spec(steps=4, seconds=0.3)
    finished = shell(f"{shlex.join([*polycom, 'run', spec])} {redirection}")
    assert (finished.returncode, finished.stderr) == (0, said)
    assert finished_step() == 4


@pytest.mark.full
def test_a_run_whose_terminal_is_closed_trains_to_the_end(
    toy_spec: Callable[..., str], polycom: list[str]
) -> None:
    ours, theirs = pty.openpty()
    command = [*polycom, "run", toy_spec(steps=4, seconds=0.3)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"small: starting")
        os.close(ours)
    assert process.returncode == 0
    assert finished_step() == 4


def test_what_a_terminal_cannot_show_is_escaped_and_the_run_goes_on(
    toy_spec: Callable[..., str], polycom: list[str]
) -> None:
    folder = os.fsdecode(b"\xfcber-\xc3\xbc")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    finished = subprocess.run(
        [*polycom, "run", toy_spec(steps=1, talk="\u00fc"), "--output", folder],
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"\\udcfcber-\\xfc" in finished.stdout
    assert (Path(folder) / "checkpoints" / "step").read_text() == "1"
    assert "says ü" in (Path(folder) / "log.txt").read_text(encoding="utf-8", errors="replace")
    script = (Path(folder) / "command.sh").read_bytes()
    assert b"--run-dir=" + os.fsencode(Path(folder).absolute()) in script.replace(b"'", b"")


@pytest.mark.parametrize(
    ("sink", "status"),
    [("> /dev/full", 1), *(pytest.param(sink, 0, marks=pytest.mark.full) for sink in ("| head -1", "> out"))],
)
def test_the_loss_of_output_that_was_asked_for_is_told_but_for_the_end_of_a_pipe(
    toy_spec: Callable[..., str], polycom: list[str], sink: str, status: int
) -> None:
    finished = shell(f"{shlex.join([*polycom, 'run', toy_spec(steps=1), '--dry-run'])} {sink}")
    assert (finished.returncode, finished.stderr) == (status, LOST if status else "")


def test_finished_work_is_not_undone_by_its_last_line(polycom: list[str], tmp_path: Path) -> None:
    (tmp_path / "ü.jsonl").write_text('{"text": "a"}\n')
    prepare = ["data", "prepare", "ü.jsonl", "--output", "ü", "--train-tokenizer", "300", "--workers", "1"]
    command = f"cd {tmp_path} && export PYTHONIOENCODING=ascii && {shlex.join([*polycom, *prepare])}"
    finished = shell(f"{command} > /dev/full")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.endswith(LOST)
    again = shell(command)
    assert again.returncode == 0, again.stderr
    assert r"\xfc.bin, \xfc.idx, \xfc.tokenizer.json: 1 documents" in again.stdout
