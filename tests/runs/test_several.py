"""`polycom run A B C --jobs N`: what runs at once, what a failure and a signal mean for the others."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext.cli import main

OUTPUTS = Path("outputs")


def attempt(name: str) -> dict[str, str]:
    [only] = json.loads((OUTPUTS / name / "versions.json").read_text())["attempts"]
    return dict(only)


def overlap(one: str, other: str) -> bool:
    a, b = attempt(one), attempt(other)
    return a["started"] < b["ended"] and b["started"] < a["ended"]


def test_as_many_run_at_once_as_are_asked_for_and_lines_name_their_run(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    specs = [toy_spec(name, steps=2, seconds=1.0) for name in "abc"]
    assert main(["run", *specs, "--jobs", "2"]) == 0
    assert overlap("a", "b")
    assert attempt("c")["started"] >= min(attempt("a")["ended"], attempt("b")["ended"])
    lines = capfd.readouterr().out.splitlines()
    assert {line.split(": ")[0] for line in lines} == {*"abc"}
    for name in "abc":
        assert [line for line in lines if line.startswith(f"{name}: step  2/2")]


def test_without_being_asked_one_runs_after_the_other(toy_spec: Callable[..., str]) -> None:
    assert main(["run", toy_spec("a", steps=1), toy_spec("b", steps=1)]) == 0
    assert not overlap("a", "b")


def test_those_under_way_end_well_beside_one_that_fails_and_no_other_starts(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    failing = toy_spec("failing", steps=1, fail_at=1)
    specs = [toy_spec("long", steps=2, seconds=2.0), failing, toy_spec("waiting", steps=1)]
    assert main(["run", *specs, "--jobs", "2"]) == 1
    assert attempt("failing")["ended"] < attempt("long")["ended"]
    assert (attempt("failing")["status"], attempt("long")["status"]) == (1, 0)
    assert not (OUTPUTS / "waiting").exists()
    assert "failing: the trainer failed with exit status 1" in capfd.readouterr().err


def test_the_exit_status_is_the_highest(toy_spec: Callable[..., str]) -> None:
    refused = toy_spec("refused", steps=1, refuse="it cannot be right")
    assert main(["run", refused, toy_spec("failing", steps=1, seconds=1.0, fail_at=1), "--jobs", "2"]) == 2
    assert (attempt("refused")["status"], attempt("failing")["status"]) == (2, 1)


def test_a_directory_in_use_leaves_the_run_beside_it_alone(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    (OUTPUTS / "b").mkdir(parents=True)
    with (OUTPUTS / "b" / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        specs = [toy_spec("a", steps=2, seconds=0.5), toy_spec("b", steps=1)]
        assert main(["run", *specs, "--jobs", "2"]) == 2
    assert attempt("a")["status"] == 0
    assert capfd.readouterr().err.startswith(f"polycom run: {(OUTPUTS / 'b').absolute()} is in use by")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_of_them_and_starts_no_other(
    toy_spec: Callable[..., str], polycom: list[str], signum: signal.Signals
) -> None:
    specs = [toy_spec(name, steps=500, seconds=0.05) for name in "abc"]
    with subprocess.Popen(
        [*polycom, "run", *specs, "--jobs", "2"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.DEVNULL,
    ) as process:
        paths = [OUTPUTS / name / "pid-0" for name in "ab"]
        deadline = time.monotonic() + 60
        while not all(path.exists() and path.read_text() for path in paths):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signum)
        assert process.wait(60) == 128 + signum
    assert [attempt(name)["signal"] for name in "ab"] == [signum, signum]
    assert not (OUTPUTS / "c").exists()
    for path in paths:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "²"])
def test_a_number_of_runs_below_one_is_refused(
    toy_spec: Callable[..., str], jobs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", toy_spec(steps=1), f"--jobs={jobs}"])
    assert exit_.value.code == 2
    assert f"argument --jobs: {jobs!r} is no whole number from 1 up" in capfd.readouterr().err


def test_each_value_of_a_comparison_runs_in_a_directory_of_its_name(toy_spec: Callable[..., str]) -> None:
    spec = toy_spec("a", steps=1)
    assert main(["run", spec, "--each", "activation=gelu,relu"]) == 0
    assert {path.name for path in OUTPUTS.iterdir()} == {"a-gelu", "a-relu"}
