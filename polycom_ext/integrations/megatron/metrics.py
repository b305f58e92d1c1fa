"""What Megatron writes to TensorBoard, kept in a run's metrics.jsonl as well."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

NAMES = {
    "lm loss": "train/loss",
    "grad-norm": "train/grad_norm",
    "learning-rate": "train/learning_rate",
    "iteration-time": "train/step_seconds",
    "load_balancing_loss": "train/load_balancing_loss",
    "z_loss": "train/z_loss",
    "lm loss validation": "{split}/loss",
}
"""Megatron's tag -> the name in metrics.jsonl; the tag does not tell the split, `valid` or `test`."""
EVALUATIONS = ("valid/loss", "test/loss")


class MetricsWriter:
    """Takes the place of a TensorBoard SummaryWriter: appends `{"step": …, "metrics": {…}}` lines to a file.

    A step keeps its first evaluation, which all runs make on the same batches: Megatron evaluates once more
    after the last step, on others, and again where a finished run is started again. What the file already
    holds counts, but for the steps that this process trains anew (`begin_after`). Of other values, and of the
    lines of a step that was trained twice, readers take the last. Everything goes on to `tensorboard`, if
    there is one.
    """

    split = "valid"
    """The set that is being evaluated."""

    def __init__(self, path: Path, tensorboard: Any = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._evaluated = _evaluations(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._tensorboard = tensorboard
        self._step = -1
        self._metrics: dict[str, float] = {}

    def begin_after(self, step: int) -> None:
        """Take evaluations of later steps anew: training goes on from this one's checkpoint, or from 0."""
        self._evaluated = {(at, name) for at, name in self._evaluated if at <= step}

    def add_scalar(self, tag: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """Collect one value; a new step writes the line of the one before."""
        if tag in NAMES:
            if step != self._step:
                self._write()
                self._step = step
            name = NAMES[tag].format(split=self.split)
            if (step, name) not in self._evaluated:
                self._metrics[name] = float(value)
            if name in EVALUATIONS:
                self._evaluated.add((step, name))
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(tag, value, step, *args, **kwargs)

    def _write(self) -> None:
        if self._metrics:
            self._file.write(json.dumps({"step": self._step, "metrics": self._metrics}) + "\n")
            self._metrics = {}

    def flush(self) -> None:
        """Write the line of the present step."""
        self._write()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __getattr__(self, name: str) -> Any:
        """Any other method of a SummaryWriter: TensorBoard's own, or nothing to do."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tensorboard, name, lambda *args, **kwargs: None)


def _evaluations(path: Path) -> set[tuple[int, str]]:
    """(step, name) of every evaluation that a file of metrics holds; half-written lines are passed over."""
    found: set[tuple[int, str]] = set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found.update((int(record["step"]), name) for name in record["metrics"] if name in EVALUATIONS)
    return found
