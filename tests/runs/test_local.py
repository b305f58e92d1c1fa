"""What is launched on this machine is followed, explained when it fails, and never outlives its run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import polycom_ext
from polycom_ext.cli import main
from polycom_ext.runs import attempt, launch, plan, rundir
from polycom_ext.runs.rundir import RunDirectory
from polycom_ext.runs.site import Site
from polycom_ext.runs.spec import load
from polycom_ext.upstream import git

RUN = Path("outputs/small")


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody has reaped yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def worker_pids(count: int) -> list[int]:
    """The pids that the toy's workers wrote, once they are all there."""
    deadline = time.monotonic() + 30
    paths = [RUN / f"pid-{rank}" for rank in range(count)]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def in_the_background(action: Callable[[list[int]], None], workers: int) -> list[int]:
    """Do something to a run once its workers are up, while the main thread waits for it; their pids."""
    pids: list[int] = []

    def act() -> None:
        pids.extend(worker_pids(workers))
        action(pids)

    threading.Thread(target=act, daemon=True).start()
    return pids


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a foreground process: a shell starts its background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_worker_and_the_run_can_go_on(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    spec = toy_spec(processes=2, steps=500, seconds=0.05)

    def signal_after_a_save(pids: list[int]) -> None:
        deadline = time.monotonic() + 30
        while not (RUN / "checkpoints" / "step").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    pids = in_the_background(signal_after_a_save, workers=2)
    handler = signal.getsignal(signum)
    assert main(["run", spec]) == 128 + signum
    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert signal.getsignal(signum) is handler
    assert "the same command goes on from the last checkpoint" in capfd.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_kills_what_does_not_hear_the_first(toy_spec: Callable[..., str]) -> None:
    def interrupt_twice(pids: list[int]) -> None:
        os.kill(parent(pids[0]), signal.SIGSTOP)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    pids = in_the_background(interrupt_twice, workers=1)
    began = time.monotonic()
    assert main(["run", toy_spec(steps=500, seconds=0.05)]) == 128 + signal.SIGINT
    assert time.monotonic() - began < launch.GRACE_SECONDS
    assert not alive(pids[0])
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert (attempt["status"], attempt["signal"]) == (-signal.SIGKILL, signal.SIGINT)


def test_workers_die_with_a_killed_launcher(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    def kill_launcher(pids: list[int]) -> None:
        os.kill(parent(pids[0]), signal.SIGKILL)

    spec = toy_spec(processes=2, steps=500, seconds=0.05)
    pids = in_the_background(kill_launcher, workers=2)
    assert main(["run", spec]) == 1
    assert not any(map(alive, pids))
    assert "was killed by SIGKILL" in capfd.readouterr().err


def test_a_run_ends_as_its_first_failed_worker_did(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    in_the_background(lambda pids: os.kill(pids[1], signal.SIGKILL), workers=2)
    assert main(["run", toy_spec(processes=2, steps=500, seconds=0.05)]) == 1
    assert "the trainer was killed by SIGKILL" in capfd.readouterr().err
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert attempt["status"] == -signal.SIGKILL


def test_a_failure_shows_the_trainers_last_lines_and_not_the_launchers(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=5, fail_at=3)]) == 1
    error = capfd.readouterr().err
    assert "the trainer failed with exit status 1" in error
    assert str(RUN / "log.txt") in error
    assert error.rstrip().endswith("RuntimeError: no step 3 in this world")
    assert "ChildFailedError" not in error
    assert "ChildFailedError" in (RUN / "log.txt").read_text(), "the full text is in the log"


def test_a_refusal_is_passed_on_from_the_record_with_exit_status_2(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(processes=2, steps=5, mute=True, refuse="it cannot be right")]) == 2
    assert capfd.readouterr().err == "polycom run: small: it cannot be right\n"
    assert "cannot be right" not in (RUN / "log.txt").read_text()
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert (attempt["status"], attempt["refusal"]) == (2, "it cannot be right")


def test_an_option_that_the_trainer_does_not_know_is_passed_on_too(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=5, stepz=5)]) == 2
    assert capfd.readouterr().err == "polycom run: small: unrecognized arguments: --stepz=5\n"


def test_the_terminal_gets_a_line_a_step_and_the_log_everything(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=3)]) == 0
    out = capfd.readouterr().out
    assert "small: step  2/3  loss 2.5000  0.50 s/step  0:00 left\n" in out
    assert "chatter" not in out
    assert (RUN / "log.txt").read_text().count("chatter") == 3


def test_a_node_of_a_finished_run_does_nothing(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    """As where a job system starts its job again."""
    assert main(["run", toy_spec(steps=1)]) == 0
    assert main(["node", str(RUN)]) == 0
    assert "already complete at step 1, nothing to do" in capfd.readouterr().out
    assert len(json.loads((RUN / "versions.json").read_text())["attempts"]) == 1


def test_two_runs_cannot_share_a_directory(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=1)
    RUN.mkdir(parents=True)
    holder = (
        "import fcntl, sys; log = open('outputs/small/log.txt', 'ab'); "
        "fcntl.flock(log, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert main(["run", spec]) == 2
        process.communicate("")
    assert f"is in use by another run (process {process.pid})" in capfd.readouterr().err
    assert not (RUN / "run.yaml").exists()


def start_and_kill(polycom: list[str], spec: str, *victims: str) -> dict[str, int]:
    """Start a run in a process of its own and SIGKILL some of its processes; all of their ids."""
    process = subprocess.Popen([*polycom, "run", spec], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    [worker] = worker_pids(1)
    torchrun = parent(worker)
    pids = {"run": process.pid, "node": parent(torchrun), "torchrun": torchrun, "worker": worker}
    assert parent(pids["node"]) == process.pid
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    if {"run", "node"} & {*victims}:
        process.wait()
    while any(alive(pids[victim]) for victim in victims):
        time.sleep(0.01)
    return pids


def gone(*pids: int) -> bool:
    """Whether these processes have ended, after a while."""
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_helpers_that_a_killed_launch_has_left_are_ended_by_the_next_run(
    toy_spec: Callable[..., str], polycom: list[str]
) -> None:
    spec = toy_spec(steps=500, seconds=0.05, helper=300)
    start_and_kill(polycom, spec, "node", "torchrun", "worker")
    helper = int((RUN / "helper-0").read_text())
    try:
        assert alive(helper)
        assert main(["run", spec, "--set", "toy.steps=1", "--set", "toy.helper=null"]) == 0
        assert not alive(helper)
    finally:
        if alive(helper):
            os.kill(helper, signal.SIGKILL)


def test_a_process_that_is_ending_by_itself_keeps_no_run_out() -> None:
    """As those are, for a moment, that SIGKILL has just hit: of no launch, their memory being gone."""
    with subprocess.Popen(["true"]) as ending:  # a zombie until it is waited for
        while alive(ending.pid):
            time.sleep(0.01)
        assert launch.end_leftovers([ending.pid])
        assert not launch.end_leftovers([ending.pid, os.getpid()])
    assert not launch.end_leftovers([])


def test_a_lock_whose_holder_was_gone_when_it_was_looked_for_keeps_no_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the lock was asked for; the kernel gives the lock back within a moment."""
    directory = RunDirectory(tmp_path)
    holding = "import fcntl, sys, time; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); time.sleep(0.5)"
    monkeypatch.setattr(rundir, "holders", lambda path: [])
    with directory.log.open("ab") as log:
        holder = subprocess.Popen([sys.executable, "-c", holding], stdin=log, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with directory.locked():
            assert holder.wait(60) == 0


def test_a_training_that_outlived_its_node_is_named_and_left_alone(
    toy_spec: Callable[..., str], polycom: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=500, seconds=0.05, helper=300)
    pids = start_and_kill(polycom, spec, "node")
    torchrun, helper = pids["torchrun"], int((RUN / "helper-0").read_text())
    try:
        assert main(["run", spec]) == 2
        error = capfd.readouterr().err
        assert f"a trainer that outlived its `polycom node` (process {torchrun})" in error
        assert f"end it with `kill {torchrun}`" in error
        assert alive(pids["worker"])
        assert alive(helper)
    finally:
        os.kill(torchrun, signal.SIGTERM)
        assert gone(torchrun, pids["worker"])
        assert not alive(helper), "of the group that was ended"


def test_a_run_goes_on_and_is_recorded_to_its_end_when_who_submitted_it_is_killed(
    toy_spec: Callable[..., str], polycom: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    spec = toy_spec(steps=60, seconds=0.1)
    pids = start_and_kill(polycom, spec, "run")
    record = {path: path.stat().st_mtime_ns for path in (RUN / "run.yaml", RUN / "versions.json")}
    assert main(["run", spec, "--set", "toy.steps=1"]) == 2
    assert (
        f"another run (process {pids['node']}); wait for its end, end it with `kill" in capfd.readouterr().err
    )
    assert {path: path.stat().st_mtime_ns for path in record} == record
    assert gone(pids["node"])
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert (attempt["pid"], attempt["status"], attempt["complete"]) == (pids["node"], 0, True)
    assert json.loads((RUN / "coefficients.json").read_text())["step"] == 60


FOREIGN = {
    "GIT_DIR": "/nowhere",
    "PET_NNODES": "2",
    "PET_NO_PYTHON": "1",
    "PET_RDZV_ENDPOINT": "nowhere.example:29500",
    "PET_MAX_RESTARTS": "3",
    "MASTER_ADDR": "nowhere.example",
    "WORLD_SIZE": "16",
    "RANK": "7",
    "FS_LOCAL_RANK": "7",
    "PYTHON_EXEC": "/bin/false",
    "TORCHELASTIC_ERROR_FILE": "/proc/nowhere",
}


def test_a_run_inherits_nothing_of_another_launch(
    toy_spec: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git.commit_of(Path(polycom_ext.__file__).parent)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    assert main(["run", toy_spec(steps=1)]) == 0
    assert json.loads((RUN / "versions.json").read_text())["commit"] == commit
    (RUN / "checkpoints" / "step").unlink()
    subprocess.run([RUN / "command.sh"], check=True, timeout=120, capture_output=True)
    assert (RUN / "checkpoints" / "step").read_text() == "1"


def test_a_host_name_that_does_not_resolve_stops_no_run(
    toy_spec: Callable[..., str], polycom: list[str]
) -> None:
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname bogus.example && exec "$@"', "sh"]
    if subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to change the host name of a namespace")
    spec = toy_spec(steps=1, processes=2)
    finished = subprocess.run(
        [*renamed, *polycom, "run", spec], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_a_run_that_has_not_begun_says_what_its_trainer_said_last(
    toy_spec: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempt, "PATIENCE_SECONDS", 0.0)
    spec = load(Path(toy_spec(steps=1, seconds=2, talk="waiting for rank 7")))
    written = plan.planned(spec, None, RUN.parent, Site())
    RUN.mkdir(parents=True)
    written.directory.write(written.spec, written.adapter, written.command, written.site, {})
    assert main(["node", str(RUN)]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"no step after 0:0\d; the log ends with: nothing\n", shown)
    assert re.search(r"no step after 0:0\d; the log ends with: says waiting for rank 7\n", shown)
    assert shown.index("waiting for rank 7") < shown.index("loss 5.0000")


def test_a_trainer_that_gives_up_with_status_0_has_failed(
    toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", toy_spec(steps=2, give_up="ERROR: Invalid metadata file. Exiting")]) == 1
    error = capfd.readouterr().err
    assert "the trainer ended without a step and without an error" in error
    assert error.endswith("ERROR: Invalid metadata file. Exiting\n")


def test_a_signal_that_is_ignored_stays_ignored(toy_spec: Callable[..., str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_the_background(lambda _: os.kill(os.getpid(), signal.SIGHUP), workers=1)
        assert main(["run", toy_spec(steps=5, seconds=0.1)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
