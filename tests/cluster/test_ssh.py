"""The backend `ssh` on two hosts, each with a real sshd: they train, are unplugged, and outlive who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from polycom_ext.runs import launch
from polycom_ext.runs.record import Record

from ..runs.conftest import THIRD_PARTY
from ..runs.test_training import metrics
from ..runs.test_training import write_spec as write_megatron
from .hosts import Hosts, missing, running

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]

POLYCOM = [sys.executable, "-m", "polycom_ext.cli"]
SILENCE = 5
"""Seconds after which a node counts as gone."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with running(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


@pytest.fixture
def site(hosts: Hosts, tmp_path: Path) -> Callable[..., list[str]]:
    """Write a site of the hosts; what `polycom run` has to be given for it."""

    def write(**changes: Any) -> list[str]:
        content = {
            "backend": "ssh",
            "hosts": hosts.names,
            "ssh_options": hosts.options,
            "setup": [f"export PYTHONPATH={THIRD_PARTY}"],  # as a module of the host's would
            "preflight": {"silence": SILENCE},
            "max_restarts": 2,
            **changes,
        }
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
        return ["--site", str(tmp_path / "site.yaml")]

    return write


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., list[str]]:
    """Write a spec of the toy trainer on two nodes; the beginning of its `polycom run`."""

    def write(environment: dict[str, str] | None = None, **options: Any) -> list[str]:
        section = {key.replace("_", "-"): value for key, value in options.items()}
        spec = {
            "name": "small",
            "trainer": "toy",
            "activation": "polynorm",
            "nodes": 2,
            "environment": {"TOY_SPEC": "a b", **(environment or {})},
            "toy": section,
        }
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(spec))
        return [*POLYCOM, "run", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "run")]

    return write


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{THIRD_PARTY}", **more}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)


def start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": f"{THIRD_PARTY}"},
            start_new_session=True,
        )


def wait_until(happened: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def steps(run_dir: Path) -> int:
    """Lines of metrics so far."""
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    return Record(run_dir).attempts()


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A spec of a tiny Megatron on two processes, and its run on one machine."""
    folder = tmp_path_factory.mktemp("megatron")
    spec = write_megatron(folder, "base-dense.yaml", "polynorm", train_iters=24, tensor_model_parallel_size=2)
    plain = folder / "plain"
    ended = run([*POLYCOM, "run", str(spec), "--output", str(plain), "--processes-per-node", "2"])
    assert ended.returncode == 0, ended.stderr
    return spec, plain


def test_an_unplugged_host_is_named_and_the_run_goes_on_once_it_is_back(
    megatron: tuple[Path, Path], hosts: Hosts, site: Callable[..., list[str]], tmp_path: Path
) -> None:
    spec, plain = megatron
    run_dir, output = tmp_path / "run", tmp_path / "output"
    command = [*POLYCOM, "run", str(spec), "--output", str(run_dir), "--nodes", "2", *site()]
    submitter = start(command, output)
    try:
        wait_until(lambda: steps(run_dir) >= 6, "no sixth step")
        hosts.plug(1, "down")
        unplugged = time.monotonic()
        wait_until(lambda: "ended" in attempts(run_dir)[0], "the first attempt goes on", seconds=120)
        took = time.monotonic() - unplugged
    finally:
        hosts.plug(1, "up")
    assert submitter.wait(300) == 0, output.read_text()
    said = output.read_text()
    first, *others = attempts(run_dir)
    assert took < SILENCE + 10, took
    assert first["cause"].startswith("node 1 ("), first
    assert f"is lost: nothing was heard from it for {SILENCE} s" in first["cause"]
    assert first["cause"] in said
    assert len(others) >= 1
    assert others[-1]["from_step"] == 4
    assert metrics(run_dir) == metrics(plain)


def test_nodes_go_on_without_who_started_them_and_stop_ends_them(
    hosts: Hosts, site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [*toy(steps=2000, seconds=0.05), *site()]
    submitter = start(command, tmp_path / "output")
    wait_until(lambda: steps(run_dir) > 1, "it does not begin")
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.wait()
    before = steps(run_dir)
    wait_until(lambda: steps(run_dir) > before + 20, "it does not go on")
    again = run(command)
    assert again.returncode == 2
    assert "is in use" in again.stderr
    stopped = run([*POLYCOM, "stop", str(run_dir)])
    assert stopped.returncode == 0, stopped.stderr
    wait_until(lambda: not (hosts.pids(0) or hosts.pids(1)), "something is left", seconds=30)
    [attempt] = attempts(run_dir)
    assert attempt["signal"] == signal.SIGTERM
    assert run([*POLYCOM, "stop", str(run_dir)]).stdout.count("does not run") == 2


def test_stop_tells_those_that_it_reaches_and_names_the_other(
    hosts: Hosts, site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = ["-o", "ConnectTimeout=2", *hosts.options]
    submitter = start([*toy(steps=2000, seconds=0.05), *site(ssh_options=options)], tmp_path / "output")
    stop = [*POLYCOM, "stop", str(tmp_path / "run")]
    wait_until(lambda: steps(tmp_path / "run") > 1, "it does not begin")
    hosts.plug(1, "down")
    try:
        stopped = run(stop)
    finally:
        hosts.plug(1, "up")
    assert stopped.returncode == 2
    assert f"node 0 ({hosts.names[0]}) is told to end" in stopped.stdout
    assert f"host {hosts.names[1]} cannot be reached by ssh" in stopped.stderr
    assert run(stop).returncode == 0
    submitter.wait(120)
    wait_until(lambda: not (hosts.pids(0) or hosts.pids(1)), "something is left", seconds=30)


def test_a_signal_to_who_started_them_ends_the_nodes(
    hosts: Hosts, site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    submitter = start([*toy(steps=2000, seconds=0.05), *site()], tmp_path / "output")
    wait_until(lambda: steps(tmp_path / "run") > 1, "it does not begin")
    submitter.send_signal(signal.SIGINT)
    assert submitter.wait(launch.GRACE_SECONDS) == 128 + signal.SIGINT, (tmp_path / "output").read_text()
    wait_until(lambda: not (hosts.pids(0) or hosts.pids(1)), "something is left", seconds=10)


def test_a_failed_node_is_started_again_as_often_as_the_site_says(
    site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = run([*toy(steps=5, fail_at=3), *site(max_restarts=1)])
    assert ended.returncode == 1
    assert "started again, restart 1 of 1" in ended.stderr
    assert [one["status"] for one in attempts(tmp_path / "run")] == [1, 1]


def test_a_refused_run_is_not_started_again(
    site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = run([*toy(steps=5, refuse="it cannot be right", mute=True), *site()])
    assert ended.returncode == 2
    assert "it cannot be right" in ended.stderr
    assert len(attempts(tmp_path / "run")) == 1


def test_a_secret_reaches_the_trainer_by_no_file_and_no_command_line(
    hosts: Hosts, site: Callable[..., list[str]], toy: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = [*toy({"TOY_API_KEY": "hunter2"}, steps=60, seconds=0.05, talk="hello"), *site()]
    submitter = start(command, tmp_path / "output")
    lines: list[bytes] = []
    while submitter.poll() is None:
        lines += [*hosts.command_lines(0), *hosts.command_lines(1)]
        time.sleep(0.05)
    assert submitter.returncode == 0, (tmp_path / "output").read_text()
    assert "the key is 7 long" in (tmp_path / "run" / "log.txt").read_text()
    assert any(b"job.sh" in line for line in lines)
    assert not any(b"hunter2" in line for line in lines)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
    assert "hunter2" not in (tmp_path / "output").read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda hosts: {"hosts": hosts.names[:1]}, "nodes is 2, and the site's `hosts` are fewer ("),
        (
            lambda hosts: {
                "hosts": [hosts.names[0], hosts.names[0][:-1] + "9"],
                "ssh_options": [*hosts.options, *("-o", "ConnectTimeout=3")],
            },
            "cannot be reached by ssh",
        ),
        (
            lambda hosts: {"ssh_options": [word.replace("/key", "/another_key") for word in hosts.options]},
            "cannot be reached by ssh: root@",
        ),
        (
            lambda hosts: {"ssh_options": [word.replace("known_hosts", "none") for word in hosts.options]},
            "Host key verification failed",
        ),
        (
            lambda hosts: {"setup": ["export PYTHONHOME=/nowhere"]},
            "has no polycom_ext, after the site's `setup`",
        ),
    ],
    ids=["too few", "no such host", "refused key", "unknown host key", "no polycom"],
)
def test_a_host_that_cannot_be_had_is_named_and_nothing_starts(
    hosts: Hosts,
    site: Callable[..., list[str]],
    toy: Callable[..., list[str]],
    tmp_path: Path,
    change: Callable[[Hosts], dict[str, Any]],
    sentence: str,
) -> None:
    ended = run([*toy(steps=1), *site(**change(hosts))])
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert sentence in line
    assert hosts.names[0][:-1] in line
    assert attempts(tmp_path / "run") == []
    assert [*hosts.pids(0), *hosts.pids(1)] == []
