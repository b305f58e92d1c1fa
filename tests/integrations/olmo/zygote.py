"""Serves ranks of the OLMo training entry; see forked_ranks.py. A request's "kill_at" is a step, or null."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from forked_ranks import serve

from polycom_ext.integrations.olmo import rehearsal, train


def _entry(request: dict[str, Any]) -> int:
    if request["kill_at"]:
        _kill_at(request["kill_at"])
    return train.main(request["arguments"])


def _kill_at(step: int) -> None:
    """kill -9 of this rank as soon as it has trained `step` steps, and logged the last."""
    system_metrics = recording.RecordingTrainer.system_metrics

    def log_and_die(self: Any) -> dict[str, float]:
        metrics = system_metrics(self)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    recording.RecordingTrainer.system_metrics = log_and_die


def _wait_for(condition: Callable[[], bool], description: str, timeout: float = 10.0) -> None:
    """As upstream waits for a folder that another rank makes, but for looking only twice a second."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{description} timed out")
        time.sleep(0.01)


if __name__ == "__main__":
    rehearsal.enable()
    rehearsal.enable = lambda: None  # done, for every rank that is forked from here
    recording = importlib.import_module("polycom_ext.integrations.olmo.recording")
    # The last ones an optimizer, a model and a data loader would import, in every rank.
    for name in (
        "polycom_ext.integrations.olmo.loop",
        "torch._dynamo",
        "polycom_ext.functional",
        "s3transfer.manager",
    ):
        importlib.import_module(name)
    checkpoint: Any = importlib.import_module("olmo.checkpoint")
    checkpoint.wait_for = _wait_for
    serve(_entry)
