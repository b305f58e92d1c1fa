"""Runs that begin at once may share a dataset cache, which Megatron fills in place."""

import contextlib
import fcntl
import threading
import time
from pathlib import Path

from .conftest import Trainer


def test_a_run_waits_for_the_one_that_fills_the_cache(train: Trainer, tmp_path: Path) -> None:
    """Whose lock is held here until the run has been at its datasets for a second."""
    cache = tmp_path / "cache"
    cache.mkdir()
    written: list[list[Path]] = []

    def release() -> None:
        deadline = time.monotonic() + 60
        try:
            while not at_its_datasets() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
            written.append(list(cache.glob("*.npy")))
        finally:
            fcntl.flock(other, fcntl.LOCK_UN)

    def at_its_datasets() -> bool:
        with contextlib.suppress(OSError):  # the log is not there yet, or made anew
            return "> building train" in train.log.read_text(errors="replace")
        return False

    with (cache / ".lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        releasing = threading.Thread(target=release)
        releasing.start()
        run = train("--data-cache-path", str(cache), processes=2, iterations=1)
        releasing.join()
    assert set(run.series("train/loss")) == {1}
    assert written == [[]]
    assert list(cache.glob("*.npy"))
