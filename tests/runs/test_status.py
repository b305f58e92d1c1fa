"""`polycom status` reads rightly what runs leave behind, whatever has become of their processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polycom_ext import files
from polycom_ext.cli import main
from polycom_ext.runs import record, status, status_command
from polycom_ext.runs.record import Record

from .conftest import register, write_spec
from .test_command import NOBODY
from .test_local import alive

POLYCOM = [sys.executable, "-m", "polycom_ext.cli"]


class Runs:
    """Runs of the toy trainer side by side, each `polycom run` a process of its own."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *before: str, processes: int = 1, **options: Any) -> subprocess.Popen[bytes]:
        """Start a run; `before` is what precedes the command."""
        command = [*before, *POLYCOM, "run", write_spec(name, processes, options)]
        self.processes[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self.processes[name]

    def at_work(self, name: str) -> list[int]:
        """The pids of all that work for a run, once its first step is saved."""
        wait_for(lambda: (Path("outputs") / name / "checkpoints" / "step").exists())
        pids = files.holders(Path("outputs") / name / "log.txt")
        assert pids
        return pids

    def end(self) -> None:
        """Leave no process behind."""
        for name, process in self.processes.items():
            log = Path("outputs") / name / "log.txt"
            kill(*(files.holders(log) if log.exists() else []), *([] if process.poll() else [process.pid]))
            process.wait()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(*pids: int) -> None:
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Starts runs in an empty folder."""
    register(monkeypatch, tmp_path)
    started = Runs()
    yield started
    started.end()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that have ended, each in its own way; they went on side by side."""
    runs = Runs()
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("ended")
        register(monkeypatch, folder)
        try:
            failed = runs.start("failed", steps=5, fail_at=3)
            refused = runs.start("refused", processes=2, steps=5, refuse="it cannot\nbe right")
            long: dict[str, Any] = {"steps": 500, "seconds": 0.1}
            told = runs.start("told", **long)
            hung = runs.start("hung", "setsid", "sh", "-c", '"$@"; exit', "sh", **long)
            torn, lost = runs.start("torn", **long), runs.start("lost", **long)
            runs.at_work("torn")
            os.kill(int(Path("outputs/torn/pid-0").read_text()), signal.SIGKILL)
            runs.at_work("told")
            told.send_signal(signal.SIGTERM)
            kill(lost.pid, *runs.at_work("lost"))
            runs.at_work("hung")
            os.killpg(
                hung.pid, signal.SIGHUP
            )  # as a terminal that closes does to a shell and what it waits for
            assert failed.wait(60) == 1
            assert refused.wait(60) == 2
            assert torn.wait(90) == 1
            assert told.wait(90) == 128 + signal.SIGTERM
            wait_for(lambda: not files.holders(folder / "outputs/hung/log.txt"))
        finally:
            runs.end()
    return folder / "outputs"


def stands(path: Path) -> tuple[str, str | None]:
    found = status.read(path)
    return found.state, found.reason


def test_a_run_that_has_ended_says_how(ended: Path, finished_directory: Path) -> None:
    assert stands(finished_directory) == ("finished", None)
    assert stands(ended / "failed") == ("failed", "exit status 1")
    assert stands(ended / "refused") == ("refused", "it cannot be right")
    assert stands(ended / "told") == ("interrupted", "by SIGTERM")
    assert stands(ended / "hung") == ("interrupted", "by SIGHUP")
    assert stands(ended / "torn") == ("failed", "killed by SIGKILL")


def test_a_run_whose_processes_were_all_killed_has_died(ended: Path) -> None:
    state, reason = stands(ended / "lost")
    assert state == "died"
    assert reason is not None
    assert "is gone and has noted no end" in reason


def test_a_run_is_at_work_until_its_last_process_is_gone(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path("outputs/small")
    submitting = runs.start("small", steps=500, seconds=0.1, helper=300)
    everybody = runs.at_work("small")
    assert stands(run) == ("running", None)
    assert main(["run", "small.yaml"]) == 2, "one at a time in a directory"
    assert "is in use by another run" in capfd.readouterr().err
    assert stands(run) == ("running", None)
    assert status.read(run).attempts == 1
    if not subprocess.run([*NOBODY.split(), "true"], capture_output=True, check=False).returncode:
        command = [*NOBODY.split(), *POLYCOM, "status", "--json", str(run)]
        [seen] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert (seen["state"], seen["reason"][:32]) == ("running", "of another user; it wrote last 0")
    kill(submitting.pid)
    assert stands(run) == ("running", None)
    node = Record(run).attempts()[0]["pid"]
    assert node in everybody
    kill(node)
    assert stands(run) == ("running", f"process {node}, which watched it, is gone; its trainer goes on")
    helper = int((run / "helper-0").read_text())
    kill(*(pid for pid in everybody if pid != helper))
    assert alive(helper), "as writers of checkpoints, which wait for a worker for ever"
    assert stands(run) == ("died", f"process {node} is gone and has noted no end")


def test_a_run_outlives_the_shell_that_started_it_and_is_watched_to_its_end(runs: Runs) -> None:
    run = Path("outputs/small")
    shell = runs.start("small", "sh", "-c", 'nohup "$@" & wait', "sh", steps=60, seconds=0.1)
    runs.at_work("small")
    kill(shell.pid)
    watch = subprocess.Popen([*POLYCOM, "status", "--watch", "outputs"], stdout=subprocess.PIPE, text=True)
    interrupted = subprocess.Popen(
        [*POLYCOM, "status", "--watch", "--json", "outputs/small"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert stands(run) == ("running", None)
    assert interrupted.stdout is not None
    assert interrupted.stdout.readline() == "[\n", "something is shown"
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(30) == 130
    assert interrupted.communicate()[1] == "polycom status: interrupted\n"
    shown, _ = watch.communicate(timeout=90)
    assert watch.returncode == 0
    assert shown.count("state       running") >= 1
    assert shown.count("state       finished") == 1
    assert "step        60/60" in shown.rpartition("state")[2]
    assert stands(run) == ("finished", None)


@pytest.fixture
def run(tmp_path: Path, finished_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A copy of a finished run of two steps."""
    register(monkeypatch, tmp_path)
    return Record(shutil.copytree(finished_directory, tmp_path / "outputs" / "small"))


def change_attempt(run: Record, **changes: Any) -> None:
    """Change what is noted of the last attempt; None is not noted."""
    versions = run.read_versions()
    attempt = {**versions["attempts"][-1], **changes}
    versions["attempts"][-1] = {name: value for name, value in attempt.items() if value is not None}
    run.versions.write_text(json.dumps(versions))


def age(run: Record, seconds: float) -> None:
    for path in (run.log, run.metrics):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_run_of_another_machine_is_judged_by_what_it_writes(run: Record) -> None:
    change_attempt(run, host="far.example", ended=None, status=None, complete=None)
    age(run, 100)
    assert stands(run.path) == ("running", "on far.example; it wrote last 1:40 ago")
    age(run, 7200)
    assert stands(run.path) == ("silent", "on far.example; it wrote last 2:00:00 ago")
    record.append(run.metrics, 2, {record.STEP_SECONDS: 36000.0})
    age(run, 7200)
    assert stands(run.path)[0] == "running", "a step takes hours"


def test_a_run_that_ends_while_it_is_looked_at_has_not_died(
    run: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_attempt(run, ended=None, status=None, complete=None)
    assert stands(run.path)[0] == "died"

    def look(log: Path) -> list[int]:
        run.end_attempt(0, complete=True)
        return []

    monkeypatch.setattr(status, "writers", look)
    assert stands(run.path) == ("finished", None)


SQUEUE = """#!/bin/sh
touch "$ASKED/$$"
for i in $(seq 80); do [ $(ls "$ASKED" | wc -l) = 3 ] && exec echo PENDING Priority; sleep 0.1; done
"""
"""Answers once it has been asked three times, and never in its time before that."""


def test_job_systems_are_asked_of_all_runs_at_once(
    run: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change_attempt(run, status=1, complete=None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "asked").mkdir()
    (tmp_path / "bin" / "squeue").write_text(SQUEUE)
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    for number in range(3):
        other = run.path.with_name(f"small-{number}")
        shutil.copytree(run.path, other)
        (other / "job.json").write_text(json.dumps({"backend": "slurm", "job": f"{number}"}))
    shutil.rmtree(run.path)
    assert main(["status", "--json", "outputs"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [one["state"] for one in told] == ["queued"] * 3
    assert [one["reason"].partition(";")[0] for one in told] == [
        f"job {number} is pending (Priority)" for number in range(3)
    ]


def test_a_run_that_was_never_begun_is_planned(run: Record) -> None:
    for path in (run.versions, run.metrics, run.log):
        path.unlink()
    shutil.rmtree(run.checkpoints)
    found = status.read(run.path)
    assert (found.state, found.step, found.total_steps, found.checkpoint_step) == ("planned", None, 2, None)
    record.refuse(run.path, "not on this machine")
    assert stands(run.path) == ("refused", "not on this machine")


def test_a_run_that_ended_well_before_its_last_step_has_not_finished(run: Record) -> None:
    change_attempt(run, complete=False)
    assert stands(run.path) == ("ended", "before its last step")


def test_a_resumed_run_stands_where_it_went_on(run: Record) -> None:
    """Its metrics hold later steps of the attempt that was killed."""
    for step in range(3, 10):
        record.append(run.metrics, step, {record.TRAIN_LOSS: 5 / step, "valid/a/loss": 6 / step})
    change_attempt(run, from_step=4, status=1, complete=False)
    age(run, 3600)
    found = status.read(run.path)
    assert (found.step, found.loss, found.validation_loss) == (4, 1.25, 1.5)
    record.append(run.metrics, 5, {record.TRAIN_LOSS: 0.5})
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "met')  # being written
    found = status.read(run.path)
    assert (found.step, found.loss, found.validation_loss) == (5, 0.5, 1.2)


def test_what_a_spec_asks_for_gives_tokens_and_the_time_left(tmp_path: Path) -> None:
    run = Record(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    options = {"seq-length": 128, "global-batch-size": 16, "train-iters": 400, "ckpt-format": "torch"}
    spec = {
        "name": "small",
        "trainer": "megatron",
        "activation": "polynorm",
        "ffn_width": 768,
        "megatron": options,
    }
    run.spec.write_text(yaml.safe_dump(spec))
    run.versions.write_text('{"attempts": []}')
    with run.log.open("ab") as log:
        assert files.lock(log)
        run.begin_attempt(log, None)
        for step, seconds in ((10, 9.0), (20, 0.25), (30, 0.25)):
            record.append(run.metrics, step, {record.TRAIN_LOSS: 6.0, record.STEP_SECONDS: seconds})
        (run.checkpoints / "iter_0000020" / "mp_rank_00").mkdir(parents=True)
        torch.save({}, run.checkpoints / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt")
        (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
        os.utime(run.checkpoints / "iter_0000020", (time.time() - 60,) * 2)
        found = status.read(run.path)
    assert (found.run, found.state, found.step, found.total_steps) == ("small", "running", 30, 400)
    assert (found.tokens, found.tokens_per_second) == (30 * 2048, 8192)
    assert found.seconds_left == 370 * 0.25
    assert found.checkpoint_step == 20
    assert found.checkpoint_age_seconds == pytest.approx(60, abs=30)


def test_a_checkpoint_that_is_being_written_keeps_no_run_from_view(run: Record) -> None:
    (run.checkpoints / "step").write_text("")
    found = status.read(run.path)
    assert (found.state, found.step, found.total_steps, found.checkpoint_step) == ("finished", 2, 2, None)
    assert found.untold is not None
    assert "invalid literal" in found.untold


def test_a_run_is_told_of_without_its_trainer_and_without_torch(run: Record) -> None:
    run.spec.write_text(run.spec.read_text().replace("trainer: toy", "trainer: gone"))
    found = status.read(run.path)
    assert (found.state, found.step, found.loss, found.attempts) == ("finished", 2, 2.5, 1)
    assert found.untold is not None
    assert "unknown trainer 'gone'" in found.untold
    configs = Path(__file__).parents[2] / "configs" / "tiny"
    for name in ("dense", "olmo-moe"):
        main(["run", str(configs / f"{name}.yaml"), "--dry-run"])
    code = (
        "import sys; from polycom_ext.cli import main; main(['status', 'outputs/small']); "
        "from polycom_ext.runs import adapter; adapter.find('megatron'); adapter.find('olmo'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_table_fits_a_terminal_and_shows_no_more_than_text(
    run: Record, ended: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = run.path.rename(run.path.with_name("\x1b[2J\x1b]0;title\x07a\nb\u202e" + "long" * 30))
    shutil.copytree(ended / "lost", "outputs/lost")
    Record(hostile).refusal.write_text("no\x1b[31m")
    (Path("outputs") / "report").mkdir()
    assert main(["status", "outputs"]) == 0
    shown = capfd.readouterr().out
    head, *rows = shown.splitlines()
    assert head.split() == "run state for step tokens tok/s loss valid left saved try".split()
    assert [row.split()[1] for row in rows[:2]] == ["refused", "died"]
    assert max(map(len, [head, *rows[:2]])) <= 100
    assert shown.replace("\n", "").isprintable()
    assert rows[-1].startswith("outputs/lost: died: process")
    assert main(["status", str(hostile)]) == 0
    assert capfd.readouterr().out.replace("\n", "").isprintable()


def test_a_table_of_the_largest_numbers_fits_too() -> None:
    large = status.Status(
        *("r" * 60, "outputs/" + "r" * 60, "interrupted", None, "2020-01-01T00:00:00+00:00", 999),
        step=999_999,
        total_steps=9_999_999,
        tokens=10**15,
        tokens_per_second=9.99e5,
        loss=-1.5e99,
        validation_loss=98.7654,
        seconds_left=359_999.0,
        checkpoint_step=999_999,
        checkpoint_age_seconds=59.0,
    )
    rows = status_command._table([large, replace(large, state="running", loss=float("nan"))]).splitlines()
    assert {len(row) for row in rows} <= set(range(101))
    assert "999999/10M" in rows[1]
    assert "-2e99" in rows[1]
    assert "99:59:59" in rows[1]


def test_json_holds_all_that_is_known(run: Record, capfd: pytest.CaptureFixture[str]) -> None:
    record.append(run.metrics, 2, {record.TRAIN_LOSS: float("nan")})
    assert main(["status", "--json", str(run.path), str(run.path)]) == 0
    [found] = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert (found["run"], found["state"], found["step"], found["total_steps"]) == ("small", "finished", 2, 2)
    assert (found["loss"], found["attempts"], found["checkpoint_step"]) == ("nan", 1, 2)
    assert found["since"] == run.attempts()[0]["ended"]


def test_what_is_no_run_is_named_in_a_sentence_and_a_broken_record_keeps_no_other_from_view(
    run: Record, ended: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run.path), "outputs/none"]) == 2
    shown, error = capfd.readouterr()
    assert not shown
    assert error.startswith("polycom status: outputs/none is not a run directory: it has no run.yaml")
    assert error.count("\n") == 1
    run.versions.write_text("{")
    assert main(["status", str(run.path), str(ended / "failed")]) == 0
    shown = capfd.readouterr().out
    assert [row.split()[1] for row in shown.splitlines()[1:3]] == ["unreadable", "failed"]
    assert "versions.json cannot be read" in shown
