"""Two hosts, network namespaces with a cable between, train as one and end together when one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from polycom_ext.cli import main

from ..runs.conftest import register
from ..runs.conftest import write_spec as write_toy
from ..runs.test_local import alive, gone, parent
from ..runs.test_nodes import free_port
from ..runs.test_training import metrics, write_spec

pytestmark = pytest.mark.cluster

NAMES = ("gpu-left", "gpu-right")
"""Of the hosts; nobody can resolve them."""
SILENCE = 6
START_SECONDS = 240
"""Until the first steps, on a machine that has other work as well."""
AT_ONCE = 5.0


class Hosts:
    """The hosts: namespaces of their own for the network and for the machine's name."""

    def __init__(self) -> None:
        self._spaces = [f"polycom-lobby-{os.getpid()}-{n}" for n in range(2)]
        self.addresses = [f"10.217.{os.getpid() % 250}.{n + 1}" for n in range(2)]

    def start(self) -> None:
        for space in self._spaces:
            ip("netns", "add", space)
        one, two = self._spaces
        ip("-n", one, *"link add eth0 type veth peer name eth0 netns".split(), two)
        for space, address in zip(self._spaces, self.addresses, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")

    def end(self) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False)

    def cable(self, state: str) -> None:
        ip("-n", self._spaces[0], "link", "set", "eth0", state)

    def node(self, run: Path, rank: int) -> subprocess.Popen[str]:
        """`polycom node` on one of them."""
        inside = ["ip", "netns", "exec", self._spaces[rank], "unshare", "--uts"]
        renamed = ["sh", "-c", 'hostname "$0" && exec "$@"', NAMES[rank]]
        command = [sys.executable, "-m", "polycom_ext.cli", "node", str(run), "--node-rank", str(rank)]
        rendezvous = ["--rendezvous", f"{self.addresses[0]}:29400"]
        return subprocess.Popen(
            [*inside, *renamed, *command, *rendezvous],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = Hosts()
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Plan a run on two nodes: of Megatron-LM, with its layers divided between them, or of the toy trainer.

    Which one trains is nothing to the lobby, but that Megatron's workers fail by one another's end.
    """
    register(monkeypatch, tmp_path)

    def plan(steps: int, trainer: str) -> Path:
        run, site = tmp_path / "two", tmp_path / "site.yaml"
        site.write_text(yaml.safe_dump({"preflight": {"silence": SILENCE}}))
        if trainer == "toy":
            spec: str | Path = write_toy("polynorm", 1, {"steps": steps, "seconds": 0.05})
        else:
            layout = {"train_iters": steps, "tensor_model_parallel_size": 2}
            spec = write_spec(tmp_path, "base-dense.yaml", "polynorm", **layout)
        options = ["--set", "nodes=2", "--site", str(site), "--output", str(run)]
        assert main(["run", str(spec), *options]) == 0
        return run

    return plan


@contextlib.contextmanager
def training(hosts: Hosts, run: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Both nodes, once they have trained two steps; none is left behind."""
    nodes = [hosts.node(run, rank) for rank in (0, 1)]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
            told = [node.communicate() for node in nodes if node.poll() is not None]
            assert not told
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield nodes
    finally:
        for node in nodes:
            if node.poll() is None:
                node.terminate()
                node.communicate(timeout=90)


def child(pid: int) -> int:
    """The one of a process that has but one of interest, the first."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def cause(run: Path) -> str:
    [attempt] = json.loads((run / "versions.json").read_text())["attempts"]
    return str(attempt["cause"])


def test_two_hosts_that_cannot_resolve_their_names_train_to_the_losses_of_one(
    hosts: Hosts, planned: Callable[..., Path], tmp_path: Path
) -> None:
    two, one = planned(4, "Megatron-LM"), tmp_path / "one"
    spec = str(tmp_path / "polynorm.yaml")
    assert main(["run", spec, "--set", "processes_per_node=2", "--output", str(one)]) == 0
    nodes = [hosts.node(two, rank) for rank in (1, 0)]
    told = [node.communicate(timeout=START_SECONDS) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert len(metrics(one)) == 4
    for step, values in metrics(one).items():
        assert metrics(two)[step] == pytest.approx(values, rel=1e-6)


def test_a_pulled_cable_ends_both_sides_within_the_stated_time_and_each_names_the_other(
    hosts: Hosts, planned: Callable[..., Path]
) -> None:
    run = planned(100_000, "toy")
    with training(hosts, run) as nodes:
        hosts.cable("down")
        pulled = time.monotonic()
        try:
            told = [node.communicate(timeout=60)[1] for node in nodes]
        finally:
            hosts.cable("up")
        assert time.monotonic() - pulled < SILENCE + AT_ONCE
    quiet = f"is lost: nothing was heard from it for {SILENCE} s; so the trainer of this node was ended"
    assert f"node 1 ({NAMES[1]}) {quiet}" in told[0]
    assert f"node 0 ({hosts.addresses[0]}) {quiet}" in told[1]
    assert [node.returncode for node in nodes] == [1, 1]
    assert cause(run).startswith(f"node 1 ({NAMES[1]}) is lost")


def test_two_pods_of_one_machine_are_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the machine's network, each with process ids of its own, which come out alike."""
    register(monkeypatch, tmp_path)
    spec = write_toy("small", 1, {"steps": 2})
    assert main(["run", spec, "--set", "nodes=2", "--set", "environment.GLOO_SOCKET_IFNAME=lo"]) == 0
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    node = [sys.executable, "-m", "polycom_ext.cli", "node", "outputs/small", "--rendezvous"]
    command = [*apart, *node, f"127.0.0.1:{free_port()}", "--node-rank"]
    pods = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    try:
        told = [pod.communicate(timeout=START_SECONDS)[1] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], told


@pytest.mark.parametrize(
    ("rank", "victim", "trainer", "said"),
    [
        (1, "polycom node", "toy", "node 1 (gpu-right) is lost: its connection was closed"),
        (1, "torchrun", "toy", "the trainer of node 1 (gpu-right) was killed by SIGKILL"),
        (1, "worker", "Megatron-LM", "the trainer of node 1 (gpu-right) was killed by SIGKILL"),
        (0, "polycom node", "toy", "node 0 (ADDRESS) is lost: its connection was closed"),
    ],
)
def test_what_is_killed_on_one_host_ends_the_other_at_once(
    hosts: Hosts, planned: Callable[..., Path], rank: int, victim: str, trainer: str, said: str
) -> None:
    run = planned(100_000, trainer)
    said = said.replace("ADDRESS", hosts.addresses[0])
    with training(hosts, run) as nodes:
        torchruns = [child(node.pid) for node in nodes]
        workers = [child(torchrun) for torchrun in torchruns]
        pids = {"polycom node": nodes[rank].pid, "torchrun": torchruns[rank], "worker": workers[rank]}
        assert parent(workers[rank]) == torchruns[rank]
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        other = nodes[1 - rank]
        error = other.communicate(timeout=60)[1]
        assert time.monotonic() - killed < AT_ONCE, error
        nodes[rank].wait(60)
    assert said in error
    assert other.returncode == 1
    assert nodes[rank].returncode == (-signal.SIGKILL if victim == "polycom node" else 1)
    assert cause(run) == said
    assert not any(map(alive, [torchruns[1 - rank], workers[1 - rank]]))
    assert gone(*torchruns, *workers)
