"""`polycom doctor --nodes` on each of several nodes, which are processes of this machine here."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from polycom_ext.cli import main
from polycom_ext.runs.lobby.network import free_port

DOCTOR = [sys.executable, "-m", "polycom_ext.cli", "doctor"]


def on_two_nodes(*options: str) -> list[subprocess.CompletedProcess[str]]:
    command = [*DOCTOR, "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", *options, "--node-rank"]
    nodes = [
        subprocess.Popen([*command, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    ended = [node.communicate(timeout=120) for node in nodes]
    return [
        subprocess.CompletedProcess(rank, node.returncode, *told)
        for rank, node, told in zip("01", nodes, ended, strict=True)
    ]


def test_nodes_that_are_alike_and_well_are_shown_by_node_0() -> None:
    first, second = on_two_nodes()
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    *lines, _, verdict = first.stdout.splitlines()
    assert verdict == "2 nodes, alike and well"
    for rank, line in enumerate(lines):
        assert line.startswith(f"node {rank}   {platform.node()}")
        assert f"Python {platform.python_version()}" in line


@pytest.mark.full
def test_what_is_wrong_is_said_on_each_node(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("preflight: {disk: 900000T, off: [idle, health]}\n")
    for node in on_two_nodes("--site", str(site)):
        assert node.returncode == 2
        for rank in (0, 1):
            assert f"node {rank} ({platform.node()}) has " in node.stderr
        assert "preflight.disk is 9e+08 GB" in node.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--node-rank", "2", "--rendezvous", "a:1"],
            "--node-rank '2' is none of 0 to 1",
        ),
        (["--node-rank", "1", "--rendezvous", "a"], "--rendezvous 'a' is no HOST:PORT of node 0"),
        (["--config", "spec.yaml"], "--nodes compares machines"),
    ],
)
def test_a_node_that_does_not_know_its_place_is_refused(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--nodes", "2", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_node_that_does_not_come_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("preflight: {wait: 0.3}\n")
    place = ["--node-rank", "0", "--rendezvous", f"127.0.0.1:{free_port()}", "--site", str(site)]
    assert main(["doctor", "--nodes", "3", *place]) == 1
    assert "nodes 1 and 2 did not call 127.0.0.1:" in capsys.readouterr().err
