"""A run that is told to stop: its trainer saves and ends, within the grace that the spec gives it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.cli import main

RUN = Path("outputs") / "small"
SAVES = {"steps": 500, "seconds": 0.1, "save-interval": 1000}
"""Nothing is saved but at a stop."""


def soon(*signals: signal.Signals, once: Callable[[], bool]) -> None:
    """Send these to this process, where `main` runs, one after the other has shown."""

    def send() -> None:
        for number, signum in enumerate(signals):
            wait_for(once if number == 0 else saving)
            os.kill(os.getpid(), signum)

    threading.Thread(target=send, daemon=True).start()


def wait_for(shows: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not shows():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trained() -> bool:
    return (RUN / "metrics.jsonl").exists()


def saving() -> bool:
    return "saving before the end" in (RUN / "log.txt").read_text()


def last_attempt() -> dict[str, Any]:
    attempt: dict[str, Any] = json.loads((RUN / "versions.json").read_text())["attempts"][-1]
    return attempt


def last_step() -> int:
    return int(json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["step"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_stopped_run_saves_first(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    spec = toy_spec(processes=2, save_seconds=1, **SAVES)
    soon(signum, once=trained)
    assert main(["run", spec]) == 128 + signum
    stopped_at = last_step()
    assert 1 <= stopped_at < 500
    assert (
        f"the same command goes on from the last checkpoint, of step {stopped_at}" in capfd.readouterr().err
    )
    attempt = last_attempt()
    assert (attempt["status"], attempt["signal"], attempt["complete"]) == (0, signum, False)
    assert (RUN / "checkpoints" / "step").read_text() == str(stopped_at)


@pytest.mark.full
def test_a_second_signal_ends_a_trainer_that_is_still_saving(toy_spec: Callable[..., str]) -> None:
    spec = toy_spec(save_seconds=300, **SAVES)
    soon(signal.SIGUSR1, signal.SIGTERM, once=trained)
    assert main(["run", spec]) == 128 + signal.SIGUSR1
    assert last_attempt()["status"] == -signal.SIGKILL
    assert not (RUN / "checkpoints" / "step").exists()


@pytest.mark.full
def test_a_trainer_that_saves_for_longer_than_the_grace_is_ended(toy_spec: Callable[..., str]) -> None:
    spec = toy_spec(save_seconds=300, **SAVES)
    soon(signal.SIGTERM, once=trained)
    assert main(["run", spec, "--set", "stop_grace_seconds=1"]) == 128 + signal.SIGTERM
    assert last_attempt()["status"] == -signal.SIGKILL


@pytest.mark.full
def test_ctrl_c_ends_a_run_without_saving(toy_spec: Callable[..., str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        spec = toy_spec(save_seconds=0, **SAVES)
        soon(signal.SIGINT, once=trained)
        assert main(["run", spec]) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_attempt()["status"] not in (0, -signal.SIGKILL), "it has heard the signal, and ended by that"
    assert not (RUN / "checkpoints" / "step").exists()
