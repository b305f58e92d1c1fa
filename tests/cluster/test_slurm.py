"""The backend `slurm` on a real Slurm of two nodes: what trains, is resumed, is stopped, and is refused."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.cli import main
from polycom_ext.runs.backends import slurm
from polycom_ext.runs.record import Record
from polycom_ext.runs.status import read

from ..runs import hostile
from ..runs.conftest import register
from ..runs.test_training import metrics
from ..runs.test_training import write_spec as write_megatron
from .slurm_cluster import cluster, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=f"a Slurm of this machine needs {', '.join(missing())}"),
]
POLYCOM = [sys.executable, "-m", "polycom_ext.cli"]
CANARY = "canary"
"""A file that a command in a hostile text would make."""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def out_of_time(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Record]:
    """A job of a minute's limit, Slurm's shortest, which passes beside the other tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch, tmp_path_factory.mktemp("out-of-time"))
        monkeypatch.setenv("SLURM_CONF", str(configuration))
        # Slurm looks each 30 s, and so tells up to as much too early.
        write_site(slurm={"time": "1", "signal": "USR1@5"}, max_restarts=10)
        return submit(toy(steps=60, seconds=1.0))


@pytest.fixture(autouse=True)
def place(
    tmp_path: Path, configuration: Path, out_of_time: tuple[str, Record], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """An empty folder on the cluster; jobs that a test leaves end with it."""
    register(monkeypatch, tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    yield

    def left() -> list[str]:
        jobs = told("squeue", "--noheader", "--format=%i").split()
        return [job for job in jobs if job != out_of_time[0]]

    if jobs := left():
        told("scancel", *jobs)
    wait_until(lambda: not left(), "an empty queue")


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.2)


def write_site(**site: Any) -> str:
    Path("site.yaml").write_text(yaml.safe_dump({"backend": "slurm", **site}))
    return "site.yaml"


def toy(name: str = "small", nodes: int = 2, **options: Any) -> str:
    """A spec of the toy trainer on the two nodes."""
    environment = {"TOY_SPEC": "a b", "GLOO_SOCKET_IFNAME": "lo"}
    section = {key.replace("_", "-"): value for key, value in options.items()}
    spec = {"trainer": "toy", "activation": "polynorm", "nodes": nodes, "environment": environment}
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**spec, "toy": section}))
    return f"{name}.yaml"


def submit(spec: str, *more: str) -> tuple[str, Record]:
    """Hand a run over; its job's number, and its record."""
    said = told(*POLYCOM, "run", spec, "--site", "site.yaml", *more)
    found = re.search(r"job (\d+); (`polycom status .* --watch`) and ", said)
    assert found is not None, said
    return found[1], Record(Path(shlex.split(found[2].strip("`"))[2]))


def about(job: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", told("scontrol", "show", "job", job)))


def ended(job: str, record: Record) -> str:
    """The state in which a job ends, restarts and all."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: about(job)["JobState"] in over, f"end of job {job}: {about(job)}\n{said_by(record)}")
    return about(job)["JobState"]


def said_by(record: Record) -> str:
    return record.job_log.read_text() if record.job_log.exists() else ""


def processes(job: str, node: int | None = None) -> list[int]:
    """What runs of a job, on one of its nodes or on both: told by the variables that Slurm gives a task."""
    wants = [f"SLURM_JOB_ID={job}", *([] if node is None else [f"SLURM_NODEID={node}", "SLURM_PROCID="])]
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(any(variable.startswith(want) for variable in variables) for want in wants):
            found.append(int(path.parent.name))
    return found


def attempts(record: Record) -> list[tuple[int | None, int | None]]:
    """Of each: the step that it went on from, and the signal that stopped it."""
    return [(attempt["from_step"], attempt.get("signal")) for attempt in record.attempts()]


LENGTH = {"train_iters": 60, "save_interval": 20, "eval_interval": 30}
"""Of a training that leaves a moment to come in between."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """The losses of a tiny Megatron model, trained by two processes of this machine."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch, folder)
        spec = write_megatron(folder, "base-dense.yaml", "polynorm", **LENGTH)
        assert main(["run", str(spec), "--set", "processes_per_node=2", "--output", str(folder / "run")]) == 0
    return metrics(folder / "run")


def on_two_nodes(folder: Path, **options: int) -> list[str]:
    """The same model as a run on two nodes."""
    spec = write_megatron(folder, "base-dense.yaml", "polynorm", **{**LENGTH, **options})
    return [str(spec), "--nodes", "2", "--set", "environment.GLOO_SOCKET_IFNAME=lo"]


def test_two_nodes_train_to_the_losses_of_a_plain_run_and_do_not_start_again(
    reference: dict[int, dict[str, float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_site()
    job, record = submit(*on_two_nodes(tmp_path))
    assert main(["run", *on_two_nodes(tmp_path), "--site", "site.yaml"]) == 2
    assert f"{record.path} is in use by" in capfd.readouterr().err
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert metrics(record.path) == reference
    assert "calls 127.0.0.1:" in said_by(record)
    assert (
        told(*POLYCOM, "logs", str(record.path), "--node", "1")
        == record.log.with_name("log.node-1.txt").read_text()
        != ""
    )

    assert main(["run", *on_two_nodes(tmp_path), "--site", "site.yaml"]) == 0
    assert "already complete at step 60, nothing to do" in capfd.readouterr().out
    again = told("sbatch", "--parsable", str(record.path / "job.sh")).strip()
    assert ended(again, record) == "COMPLETED"
    assert attempts(record) == [(None, None)]


def test_a_run_whose_node_was_killed_is_queued_again_and_ends_with_the_same_losses(
    reference: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    write_site(max_restarts=1)
    job, record = submit(*on_two_nodes(tmp_path))
    wait_until((record.checkpoints / "latest_checkpointed_iteration.txt").exists, "checkpoint")
    killed = processes(job, node=1)
    assert len(killed) >= 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert about(job)["Restarts"] == "1"
    assert [step is not None and step >= 20 for step, _ in attempts(record)] == [False, True]
    assert metrics(record.path) == reference


def test_a_warned_run_saves_a_checkpoint_is_queued_again_and_ends_with_the_same_losses(
    reference: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    write_site()
    job, record = submit(*on_two_nodes(tmp_path, save_interval=1000))
    wait_until(record.metrics.exists, "step")
    told("scancel", "--signal=USR1", job)  # as Slurm itself does before the time limit
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert about(job)["Restarts"] == "1"
    (_, first), (step, second) = attempts(record)
    assert (first, second) == (signal.SIGUSR1, None)
    assert step is not None
    assert 0 < step < LENGTH["train_iters"]
    assert metrics(record.path) == reference


@pytest.mark.parametrize("how", ["scancel", "polycom stop"])
def test_a_run_that_a_person_stops_is_gone_and_not_queued_again(how: str) -> None:
    write_site()
    job, record = submit(toy(steps=500, seconds=0.2))
    wait_until((record.checkpoints / "step").exists, "step")
    told(*(["scancel", job] if how == "scancel" else [*POLYCOM, "stop", str(record.path)]))
    assert ended(job, record) == ("CANCELLED" if how == "scancel" else "FAILED")
    assert about(job)["Restarts"] == "0"
    assert attempts(record) == [(None, signal.SIGTERM)]
    assert processes(job) == []


def test_a_waiting_run_is_stopped_too_and_one_that_has_ended_is_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_site(slurm={"hold": True})
    job, record = submit(toy(steps=1))
    assert main(["stop", str(record.path)]) == 0
    assert f"cancelled job {job}, which was pending" in capfd.readouterr().out
    assert main(["stop", str(record.path)]) == 2
    assert "small: Slurm has no job of it, waiting or running: nothing to stop" in capfd.readouterr().err


def test_a_refused_run_is_not_queued_again() -> None:
    write_site()
    job, record = submit(toy(steps=3, refuse="it cannot be right"))
    assert ended(job, record) == "FAILED"
    assert about(job)["ExitCode"] == "2:0"
    assert len(record.attempts()) == 1
    assert "small: it cannot be right" in said_by(record)


def test_a_run_that_fails_every_time_is_queued_in_between_and_given_up_after_max_restarts() -> None:
    write_site(slurm={"hold": True}, max_restarts=1)
    job, record = submit(toy(steps=3, fail_at=2))
    assert read(record.path).state == "queued"
    assert (read(record.path).reason or "").startswith(f"job {job} is pending (JobHeldUser")
    told("scontrol", "release", job)
    wait_until(lambda: "ended" in (record.attempts() or [{}])[0], "end of an attempt")
    seen = set()

    def is_started_again() -> bool:
        status = read(record.path)
        seen.add((status.state, status.reason))
        return len(record.attempts()) == 2

    wait_until(is_started_again, "second attempt", seconds=120)
    assert {state for state, _ in seen} <= {"queued", "running"}
    before = "; before that failed: the trainer of node "
    assert [one for _, one in seen if one and f"job {job} is pending" in one and before in one], seen
    assert ended(job, record) == "FAILED"
    assert attempts(record) == [(None, None), (1, None)]
    assert "exit status 1 after 1 restarts, as many as max_restarts allows" in said_by(record)
    wait_until(lambda: read(record.path).state == "failed", "end of the job")


def test_two_runs_share_the_machine() -> None:
    write_site()
    jobs = [submit(toy(name, steps=5, seconds=1.0)) for name in "ab"]
    assert [ended(*job) for job in jobs] == ["COMPLETED"] * 2
    one, other = (record.attempts()[0] for _, record in jobs)
    assert one["started"] < other["ended"]
    assert other["started"] < one["ended"]


ONE_LINE = [text for text in hostile.strings() if not {"\n", "\0", "\ud800"} & {*text}]
"""What a text of a site may be for sbatch; the others are refused."""


def test_nothing_of_a_site_or_a_folder_is_executed_or_lost() -> None:
    value = "".join(random.Random(0).sample(ONE_LINE, 20))
    write_site(
        slurm={"comment": value},
        environment={"TOY_SITE": f"{value}\nand a second line"},
        setup=["true 'it''s' \"a $HOME\" # a comment"],
    )
    job, record = submit(toy(steps=1, talk="hello"), "--output", f"a b %j 'c' $(touch {CANARY}) @SETUP@")
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert told("scontrol", "show", "job", job).split("Comment=")[1].split("\n")[0].rstrip() == value.rstrip()
    assert record.job_log.is_file()
    assert list(Path.cwd().rglob(CANARY)) == []


def test_sbatch_reads_200_hostile_options_as_they_are() -> None:
    jobs = {}
    for comment in ONE_LINE:
        script = f"#!/bin/bash\n#SBATCH --comment={slurm.quoted(comment)}\n#SBATCH --hold\ntrue\n"
        Path("job.sh").write_text(script)
        jobs[told("sbatch", "--parsable", "job.sh").strip()] = comment
    lines = told("squeue", "--noheader", "--format=%i %k").strip().split("\n")
    shown = dict(line.split(" ", 1) for line in lines)
    assert {job: comment.rstrip() for job, comment in shown.items() if job in jobs} == {
        job: comment.rstrip() for job, comment in jobs.items()
    }


def test_a_secret_reaches_the_trainer_and_stands_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOY_API_KEY", raising=False)
    write_site(environment={"TOY_API_KEY": "hunter2"})
    job, record = submit(toy(steps=1, talk="hello"))
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert "the key is 7 long" in record.log.read_text()
    for path in record.path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_what_slurm_does_not_take_is_its_own_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    write_site(slurm={"partition": "nowhere"})
    assert main(["run", toy(steps=1), "--site", "site.yaml"]) == 2
    error = capfd.readouterr().err
    assert "invalid partition" in error
    assert error.count("\n") == 1


def test_a_run_out_of_time_is_queued_again_until_it_is_done(out_of_time: tuple[str, Record]) -> None:
    """The last one, as it has begun with the first."""
    job, record = out_of_time
    assert ended(job, record) == "COMPLETED", said_by(record)
    assert int(about(job)["Restarts"]) >= 1
    assert "queued again, restart 1 of 10" in said_by(record)
    first, second, *_ = attempts(record)
    assert first[0] is None
    assert second[0] is not None
    assert sorted(metrics(record.path)) == list(range(1, 61))
