"""`polycom stop` and `polycom logs` of a run on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polycom_ext.cli import main

RUN = Path("outputs/small")


@pytest.fixture
def running(toy_spec: Callable[..., str], polycom: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A run that goes on until it is told to end, from its first step on."""
    process = subprocess.Popen([*polycom, "run", toy_spec(steps=1000, seconds=0.05)])
    try:
        deadline = time.monotonic() + 60
        while not (RUN / "checkpoints" / "step").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def test_a_run_that_is_stopped_notes_it_and_its_log_is_followed_to_the_end(
    running: subprocess.Popen[bytes], polycom: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([*polycom, "logs", str(RUN), "-f"], stdout=subprocess.PIPE, text=True) as logs:
        assert logs.stdout is not None
        assert "attempt 1" in logs.stdout.readline()
        assert main(["stop", str(RUN)]) == 0
        assert "small: asked process" in capfd.readouterr().out
        assert running.wait(60) == 128 + signal.SIGTERM
        followed, _ = logs.communicate(timeout=60)
    assert followed.endswith((RUN / "log.txt").read_text()[-200:])
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert attempt["signal"] == signal.SIGTERM
    assert main(["stop", str(RUN)]) == 2
    assert "small does not run on this machine: nothing to stop" in capfd.readouterr().err


@pytest.mark.usefixtures("toy_spec")
def test_a_run_on_another_machine_is_stopped_there(
    finished_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = finished_directory / "versions.json"
    whole = path.read_text()
    versions = json.loads(whole)
    [attempt] = versions["attempts"]
    begun = {key: attempt[key] for key in ("started", "from_step", "pid")}
    try:
        path.write_text(json.dumps({**versions, "attempts": [{**begun, "host": "gpu-07"}]}))
        assert main(["stop", str(finished_directory)]) == 2
    finally:
        path.write_text(whole)
    assert "it was started on gpu-07, where to give this" in capfd.readouterr().err


def test_a_finished_runs_log_is_shown_once_followed_or_not(
    finished_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["-f"]):
        assert main(["logs", str(finished_directory), *options]) == 0
        assert capfd.readouterr().out == (finished_directory / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--node", "1"], "outputs/small has no node 1: its nodes are 0 to 0"),
        (["--job"], "job.txt is not there: nothing was said yet, or no job system has the run"),
    ],
)
def test_a_log_that_is_not_there_is_named(
    finished_directory: Path, options: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(finished_directory), *options]) == 2
    assert sentence in capfd.readouterr().err
