"""Serves ranks of the OLMo training entry; see forked_ranks.py. A request's "kill_at" is a step, or null."""

import importlib
import os
import signal
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
    serve(_entry)
