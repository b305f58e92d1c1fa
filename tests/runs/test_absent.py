"""A node that will not come, and says so, is not waited for; the others end at once with its name."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from polycom_ext import files
from polycom_ext.cli import main

from .test_nodes import RUN, free_port, on_two_nodes

AT_ONCE = 25.0
"""On a machine with other work; nodes must appear within 600 s, and one that is silent for 30 s is lost."""
HERE = platform.node()
HOLD = """
import sys
from polycom_ext import files
with open(sys.argv[1], "ab") as log:
    files.lock(log)
    print(flush=True)
    input()
"""


@pytest.fixture
def planned(toy_spec: Callable[..., str]) -> Callable[..., None]:
    """Plan a run on two nodes whose set-up is these lines."""

    def plan(*setup: str) -> None:
        Path("site.yaml").write_text(yaml.safe_dump({"setup": list(setup)}))
        spec = toy_spec(steps=2)
        options = ["--set", "nodes=2", "--set", "environment.GLOO_SOCKET_IFNAME=lo", "--site", "site.yaml"]
        assert main(["run", spec, *options]) == 0

    return plan


def through_the_script() -> list[tuple[int, str]]:
    """(status, what it said) of both nodes, as node.sh has started them."""
    variables = {**os.environ, "POLYCOM_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    nodes = [
        subprocess.Popen(
            ["bash", RUN / "node.sh"],
            env={**variables, "POLYCOM_NODE_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    began = time.monotonic()
    try:
        said = [node.communicate(timeout=AT_ONCE)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert time.monotonic() - began < AT_ONCE
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("broken", "other", "status", "meaning"),
    [
        (1, 0, 3, 1),
        (0, 1, 125, 2),
        pytest.param(1, 0, 125, 2, marks=FULL),
        pytest.param(0, 1, 3, 1, marks=FULL),
    ],
)
def test_a_node_whose_set_up_fails_ends_the_others(
    planned: Callable[..., None], broken: int, other: int, status: int, meaning: int
) -> None:
    """With the status that has it started again, unless what has failed could start nothing."""
    planned(f'[ "$POLYCOM_NODE_RANK" != {broken} ] || exit {status}')
    ended = through_the_script()
    assert ended[broken][0] == status
    failed = f"{HERE}: its set-up or its command ended with exit status {status}"
    assert ended[other][0] == meaning
    assert f"small: node {broken} does not come: {failed}\n" in ended[other][1]


def test_a_node_that_has_not_the_command_tells_the_others(planned: Callable[..., None]) -> None:
    planned(":")
    script = RUN / "node.sh"
    script.write_text(script.read_text().replace(f"exec {sys.executable} ", "exec /no/such/python "))
    place = {"POLYCOM_NODE_RANK": "1", "POLYCOM_RENDEZVOUS": "host:1"}
    ended = subprocess.run(["bash", script], env={**os.environ, **place}, capture_output=True, check=False)
    assert ended.returncode == 127
    assert (RUN / "absent.node-1.txt").read_text().splitlines()[:2] == ["host:1", "127"]


def test_a_node_whose_directory_is_in_use_ends_the_others(
    planned: Callable[..., None], polycom: list[str]
) -> None:
    planned(":")
    (RUN / "log.node-1.txt").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, RUN / "log.node-1.txt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        began = time.monotonic()
        first, second = on_two_nodes(polycom)
        assert time.monotonic() - began < AT_ONCE
    finally:
        holder.communicate(b"\n")
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"small: node 1 does not come: {HERE}: {RUN.absolute()} is in use by" in first.stderr


@FULL
def test_what_an_earlier_start_has_left_ends_no_later_one(
    planned: Callable[..., None], polycom: list[str]
) -> None:
    planned(":")
    for rank in (0, 1):
        files.write_text(RUN / f"absent.node-{rank}.txt", "127.0.0.1:1\n2\nit was refused\n")
    first, second = on_two_nodes(polycom)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert not list(RUN.glob("absent.*"))
