"""`polycom node` on each of several nodes, which are processes of this machine here."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import polycom_ext
from polycom_ext.cli import main
from polycom_ext.runs.status import read

from .conftest import register
from .test_local import gone, worker_pids
from .test_training import metrics, write_spec

RUN = Path("outputs/small")
PACKAGE = Path(polycom_ext.__file__).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_two_nodes(polycom: list[str], run: Path = RUN) -> list[subprocess.CompletedProcess[str]]:
    """What each of two nodes ended with, node 0 first, which was started last."""
    command = [*polycom, "node", str(run), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [(subprocess.Popen([*command, rank], **pipes), rank) for rank in "10"]  # type: ignore[call-overload]
    ended = [
        subprocess.CompletedProcess(rank, node.wait(), *node.communicate(timeout=120)) for node, rank in nodes
    ]
    return ended[::-1]


@pytest.fixture
def two_nodes(toy_spec: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Plan a run on two nodes, with these options of the toy's."""

    def planned(**options: object) -> None:
        spec = toy_spec(processes=2, **options)
        assert main(["run", spec, "--set", "nodes=2", "--set", "environment.GLOO_SOCKET_IFNAME=lo"]) == 0
        assert f"polycom node {RUN.absolute()} --node-rank R --rendezvous HOST:PORT" in capfd.readouterr().out

    return planned


def test_two_nodes_are_one_run_whose_first_one_keeps_the_record(
    two_nodes: Callable[..., None], polycom: list[str]
) -> None:
    two_nodes(steps=3)
    first, second = on_two_nodes(polycom)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert sorted(path.name for path in RUN.glob("pid-*")) == ["pid-0", "pid-1", "pid-2", "pid-3"]
    assert re.search(r"step +3/3  loss 1.6667", first.stdout)
    assert "loss" not in second.stdout
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert (attempt["status"], attempt["complete"]) == (0, True)
    assert f"everything it says goes to {RUN.absolute()}/log.node-1.txt" in second.stdout


def test_what_a_worker_of_any_node_refuses_is_each_nodes_sentence(
    two_nodes: Callable[..., None], polycom: list[str]
) -> None:
    two_nodes(steps=3, refuse="it cannot be right", mute=True)
    for node in on_two_nodes(polycom):
        assert (node.returncode, node.stderr) == (2, "polycom node: small: it cannot be right\n")
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert attempt["refusal"] == "it cannot be right"


def test_a_node_whose_polycom_is_killed_ends_the_others_and_is_named_in_the_record(
    two_nodes: Callable[..., None], polycom: list[str]
) -> None:
    two_nodes(steps=500, seconds=0.05)
    command = [*polycom, "node", str(RUN), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    first, second = (
        subprocess.Popen([*command, rank], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )
    pids = worker_pids(4)
    second.kill()
    began = time.monotonic()
    sentence = f"node 1 ({platform.node()}) is lost: its connection was closed"
    assert f"small: {sentence}; so the trainer of this node was ended" in first.communicate(timeout=60)[1]
    assert time.monotonic() - began < 5.0
    assert (first.returncode, second.wait()) == (1, -signal.SIGKILL)
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert (attempt["status"], attempt["cause"]) == (1, sentence)
    assert read(RUN).reason == sentence
    assert gone(*pids), "those of the lost node as well"


@pytest.mark.full
def test_a_node_with_other_code_is_named_before_anything_starts(
    two_nodes: Callable[..., None], polycom: list[str], tmp_path: Path
) -> None:
    two_nodes(steps=1)
    other = tmp_path / "other" / "polycom_ext"
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "reference.py").open("a") as file:
        file.write("# a line more\n")
    command = [*polycom, "node", str(RUN), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(other.parent), os.environ["PYTHONPATH"]])}
    with subprocess.Popen([*command, "1"], env=path, stderr=subprocess.PIPE, text=True) as second:
        first = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60, check=False)
        said = second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"small: node 1 ({platform.node()}) has polycom-ext " in first.stderr
    assert f"small: node 1 ({platform.node()}) has polycom-ext " in said
    [attempt] = json.loads((RUN / "versions.json").read_text())["attempts"]
    assert attempt["refusal"].startswith("node 1 (")
    assert not list(RUN.glob("pid-*"))


@pytest.mark.full
def test_a_node_whose_clock_is_wrong_is_named_before_anything_starts(
    two_nodes: Callable[..., None], polycom: list[str], tmp_path: Path
) -> None:
    two_nodes(steps=1)
    fast = "import time\nnow = time.time\ntime.time = lambda: now() + 60.0\n"
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "sitecustomize.py").write_text(fast)
    command = [*polycom, "node", str(RUN), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([f"{tmp_path}/fast", os.environ["PYTHONPATH"]])}
    with subprocess.Popen([*command, "1"], env=path, stderr=subprocess.PIPE, text=True) as second:
        first = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=60, check=False)
        said = second.communicate(timeout=60)[1]
    for status, error in ((first.returncode, first.stderr), (second.returncode, said)):
        assert status == 2
        assert re.search(
            rf"node 1 \({platform.node()}\) has a clock that is (59|60|61)\.\d s ahead of", error
        )
    assert not list(RUN.glob("pid-*"))


@pytest.mark.full
def test_nodes_that_are_started_again_at_once_wait_for_what_is_left_and_go_on(
    two_nodes: Callable[..., None], polycom: list[str]
) -> None:
    two_nodes(steps=60, seconds=0.1, helper=300)
    command = [*polycom, "node", str(RUN), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    nodes = [subprocess.Popen([*command, rank], stderr=subprocess.DEVNULL) for rank in "01"]
    worker_pids(4)
    for node in nodes:
        node.kill()
        node.wait()
    first, second = on_two_nodes(polycom)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert len(json.loads((RUN / "versions.json").read_text())["attempts"]) == 2


@pytest.mark.full
def test_a_node_that_is_started_twice_is_refused_and_the_run_goes_on(
    two_nodes: Callable[..., None], polycom: list[str]
) -> None:
    two_nodes(steps=40, seconds=0.1)
    command = [*polycom, "node", str(RUN), "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    nodes = [subprocess.Popen([*command, rank]) for rank in "01"]
    worker_pids(4)
    for rank in "01":
        again = subprocess.run([*command, rank], capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 2
        assert "is in use by another run (process " in again.stderr
    assert [node.wait(60) for node in nodes] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rendezvous", "here", "--node-rank", "1"], "--rendezvous 'here' is no HOST:PORT of node 0"),
        (["--rendezvous", "a:1", "--node-rank", "2"], "node rank '2' is none of 0 to 1, as it has 2 nodes"),
        (["--node-rank", "1"], "its 2 nodes need --rendezvous HOST:PORT"),
    ],
)
def test_a_node_that_does_not_know_its_place_is_refused(
    two_nodes: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    two_nodes(steps=1)
    assert main(["node", str(RUN), *arguments]) == 2
    assert sentence in capfd.readouterr().err


def test_a_folder_that_no_run_has_planned_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["node", str(tmp_path)]) == 2
    assert f"polycom node: {tmp_path} is not a run directory" in capfd.readouterr().err


def test_a_copied_run_does_not_train_in_the_directory_that_it_was_copied_from(
    finished_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    register(monkeypatch, tmp_path)
    copy = Path(shutil.copytree(finished_directory, tmp_path / "copy"))
    assert main(["node", str(copy)]) == 2
    assert f"{copy} was planned as {finished_directory}" in capfd.readouterr().err
    assert main(["node", str(finished_directory)]) == 0


@pytest.mark.full
@pytest.mark.usefixtures("without_transformers")
def test_megatron_on_two_nodes_is_megatron_on_one_with_as_many_processes(
    polycom: list[str], tmp_path: Path
) -> None:
    layout = {"train_iters": 3, "tensor_model_parallel_size": 2}
    spec = str(write_spec(tmp_path, "base-dense.yaml", "polynorm", **layout))
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["run", spec, "--output", str(one), "--set", "processes_per_node=2"]) == 0
    nodes = ["--set", "nodes=2", "--set", "environment.GLOO_SOCKET_IFNAME=lo"]
    assert main(["run", spec, "--output", str(two), *nodes]) == 0
    assert [node.returncode for node in on_two_nodes(polycom, two)] == [0, 0]
    assert len(metrics(one)) == 3
    assert metrics(two) == metrics(one)
    coefficients = "coefficients.json"
    assert (two / coefficients).read_text() == (one / coefficients).read_text()
