"""job.sh of a host: it starts its node again after what a restart can mend, and ends it when told to."""

from __future__ import annotations

import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext.runs.backends.rendering import fill, shell

RESTARTS = 2


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start job.sh with a node that does this."""

    def start(node: str) -> subprocess.Popen[str]:
        (tmp_path / "node.sh").write_text(f"echo ran >> {tmp_path}/runs\n{node}\n")
        values = {"DIRECTORY": tmp_path, "NODE_SCRIPT": tmp_path / "node.sh", "MAX_RESTARTS": RESTARTS}
        (tmp_path / "job.sh").write_text(fill("host.sh", values, shell))
        return subprocess.Popen(
            ["bash", tmp_path / "job.sh", "1", "host:1"], stderr=subprocess.PIPE, text=True
        )

    return start


def runs(folder: Path) -> int:
    path = folder / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("node", "status", "times"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("exit 143", 143, 1),
        ("exit 1", 1, 1 + RESTARTS),
        ("kill -9 $$", 137, 1 + RESTARTS),
        ("no-such-command", 2, 1),
        ('[ "$(wc -l < "${0%/*}/runs")" = 2 ]', 0, 2),
        ('[ "$POLYCOM_NODE_RANK $POLYCOM_RENDEZVOUS" = "1 host:1" ]', 0, 1),
    ],
)
def test_a_node_runs_again_after_a_failure_and_after_nothing_else(
    job: Callable[[str], subprocess.Popen[str]], tmp_path: Path, node: str, status: int, times: int
) -> None:
    started = job(node)
    _, said = started.communicate(timeout=30)
    assert (started.returncode, runs(tmp_path)) == (status, times), said


@pytest.mark.parametrize(("ends", "told"), [(0, None), (1, 1), (2, 2), (125, 2), (143, 143)])
def test_a_node_that_is_not_started_again_tells_those_that_may_wait_for_it(
    job: Callable[[str], subprocess.Popen[str]], tmp_path: Path, ends: int, told: int | None
) -> None:
    job(f"exit {ends}").communicate(timeout=30)
    left = tmp_path / "absent.node-1.txt"
    sentence = f"host:1\n{told}\n{platform.node()}: exit status {told}\n"
    assert (left.read_text() if left.exists() else None) == (None if told is None else sentence)


@pytest.mark.parametrize(("given", "heard"), [("TERM", 143), ("USR1", 138), ("INT", 143)])
def test_a_node_that_was_told_to_end_does_not_run_again(
    job: Callable[[str], subprocess.Popen[str]], tmp_path: Path, given: str, heard: int
) -> None:
    started = job("trap 'exit 143' TERM; trap 'exit 138' USR1; sleep 30 > /dev/null 2>&1 & wait")
    while not runs(tmp_path):
        time.sleep(0.01)
    time.sleep(0.2)  # for its traps
    started.send_signal(signal.Signals[f"SIG{given}"])
    started.communicate(timeout=30)
    assert (started.returncode, runs(tmp_path)) == (heard, 1)


def test_the_end_of_who_started_it_is_none_of_its_own(
    job: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    started = job('sleep 1; echo to nobody >&2; echo end >> "${0%/*}/runs"')
    while not runs(tmp_path):
        time.sleep(0.01)
    assert started.stderr is not None
    started.stderr.close()
    started.send_signal(signal.SIGHUP)
    assert started.wait(30) == 0
    assert runs(tmp_path) == 2
