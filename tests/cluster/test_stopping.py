"""Real training on Megatron's loop that is stopped, damaged, killed while it writes, and short of disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polycom_ext.cli import main

from ..runs.test_training import metrics, write_spec

pytestmark = pytest.mark.cluster
SLOW = {"global_batch_size": 96}
"""Steps long enough for a signal to come between two of them."""
NAMES = ("train/loss", "train/grad_norm", "train/learning_rate")


def losses(run_dir: Path) -> list[list[float]]:
    logged = metrics(run_dir)
    assert list(logged) == sorted(logged)
    return [[logged[step][name] for name in NAMES] for step in range(1, 13)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """What a run logs that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    spec = write_spec(folder, "base-dense.yaml", "polynorm", **SLOW)
    assert main(["run", str(spec), "--output", str(folder / "run")]) == 0
    return losses(folder / "run")


def when(shows: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def act() -> None:
        deadline = time.monotonic() + 300
        while not shows():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def last_attempt(run_dir: Path) -> dict[str, Any]:
    attempt: dict[str, Any] = json.loads((run_dir / "versions.json").read_text())["attempts"][-1]
    return attempt


def test_stopped_then_damaged_it_goes_on_from_the_checkpoint_before(
    tmp_path: Path, straight: list[list[float]], capfd: pytest.CaptureFixture[str]
) -> None:
    spec, run_dir = write_spec(tmp_path, "base-dense.yaml", "polynorm", **SLOW), tmp_path / "run"
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    when(tracker.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["run", str(spec), "--output", str(run_dir)]) == 128 + signal.SIGTERM
    stopped = int(tracker.read_text())
    assert 4 < stopped < 12, "neither the first of the interval nor the last"
    attempt = last_attempt(run_dir)
    assert (attempt["status"], attempt["signal"], attempt["complete"]) == (0, signal.SIGTERM, False)
    [shard] = (run_dir / "checkpoints" / f"iter_{stopped:07d}").glob("*.distcp")
    os.truncate(shard, shard.stat().st_size // 2)
    capfd.readouterr()
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    assert f"iter_{stopped:07d} holds {shard.name} of" in capfd.readouterr().err
    assert (run_dir / "checkpoints" / "damaged" / f"iter_{stopped:07d}" / shard.name).exists()
    assert last_attempt(run_dir)["from_step"] == (4 if stopped <= 8 else 8)
    assert losses(run_dir) == straight


def test_killed_while_it_writes_beside_training_it_goes_on_from_a_whole_one(
    tmp_path: Path, straight: list[list[float]]
) -> None:
    beside = {"async_save": True, "async_strategy": "mcore", "use_persistent_ckpt_worker": True}
    spec, run_dir = write_spec(tmp_path, "base-dense.yaml", "polynorm", **SLOW, **beside), tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    saved, begun = checkpoints / "latest_checkpointed_iteration.txt", checkpoints / "iter_0000008"
    when(lambda: saved.exists() and begun.exists(), lambda: kill(run_dir))  # steps are quicker than a save
    assert main(["run", str(spec), "--output", str(run_dir)]) == 1
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    assert last_attempt(run_dir)["from_step"] in (4, 8)
    assert losses(run_dir) == straight


def kill(run_dir: Path) -> None:
    """-9 to all of the trainer's processes."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if f"POLYCOM_RUN_DIR={run_dir}".encode() in variables:
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.fixture
def disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 64 megabytes."""
    return disk_of("64m")


def test_a_disk_that_is_full_while_it_saves_leaves_the_checkpoint_before(
    tmp_path: Path, disk: Path, straight: list[list[float]], capfd: pytest.CaptureFixture[str]
) -> None:
    spec, run_dir = write_spec(tmp_path, "base-dense.yaml", "polynorm", **SLOW), disk / "run"

    def fill() -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "others").write_bytes(bytes(free - (300 << 10)))

    saved = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    when(saved.exists, fill)
    assert main(["run", str(spec), "--output", str(run_dir)]) == 2
    before = int(saved.read_text())
    assert before in (4, 8)  # as soon as the disk was full, on a busy machine
    error = capfd.readouterr().err
    assert f"the disk of {run_dir} is full; make room there, and the same command goes on from" in error
    assert f"the checkpoint of step {before}" in error
    (disk / "others").unlink()
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    assert last_attempt(run_dir)["from_step"] == before
    assert losses(run_dir) == straight


@pytest.mark.long
def test_a_run_that_ends_itself_before_its_last_step_is_not_complete_and_goes_on(
    tmp_path: Path, straight: list[list[float]]
) -> None:
    """As `exit-duration-in-mins` ends it, which counts in minutes."""
    spec, run_dir = write_spec(tmp_path, "base-dense.yaml", "polynorm", **SLOW), tmp_path / "run"
    assert main(["run", str(spec), "--output", str(run_dir), "--set", "megatron.exit-interval=6"]) == 0
    attempt = last_attempt(run_dir)
    assert (attempt["status"], attempt["complete"]) == (0, False)
    assert main(["run", str(spec), "--output", str(run_dir)]) == 0
    assert (last_attempt(run_dir)["from_step"], last_attempt(run_dir)["complete"]) == (6, True)
    assert losses(run_dir) == straight
