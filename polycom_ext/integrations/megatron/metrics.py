"""What Megatron writes to TensorBoard, kept in a run's metrics.jsonl as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polycom_ext.runs import record

NAMES = {
    "lm loss": record.TRAIN_LOSS,
    "grad-norm": record.GRAD_NORM,
    "learning-rate": record.LEARNING_RATE,
    "iteration-time": record.STEP_SECONDS,
    "load_balancing_loss": record.LOAD_BALANCING_LOSS,
    "z_loss": record.Z_LOSS,
}
"""Megatron's tag -> the record's name."""
EVALUATED = "lm loss validation"
"""Megatron's tag of the loss on either split, which it does not tell."""


class MetricsWriter:
    """Takes the place of a TensorBoard SummaryWriter: appends `{"step": …, "metrics": {…}}` lines to a file.

    A step keeps its first evaluation, which all runs make on the same batches: Megatron evaluates once more
    after the last step, on others, and again where a finished run is started again. What the file already
    holds counts, but for the steps that this process trains anew (`begin_after`). Of other values, and of the
    lines of a step that was trained twice, readers take the last. Everything goes on to `tensorboard`, if
    there is one.
    """

    split = record.VALID
    """The set that is being evaluated, or record.TEST."""

    def __init__(self, path: Path, tensorboard: Any = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        logged = record.read_metrics(path).series
        names = [record.evaluated(split, "", record.LOSS) for split in (record.VALID, record.TEST)]
        self._evaluated = {(step, name) for name in names for step in logged.get(name, {})}
        self._path = path
        self._tensorboard = tensorboard
        self._step = -1
        self._metrics: dict[str, float] = {}

    def begin_after(self, step: int) -> None:
        """Take evaluations of later steps anew: training goes on from this one's checkpoint, or from 0."""
        self._evaluated = {(at, name) for at, name in self._evaluated if at <= step}

    def add_scalar(self, tag: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """Collect one value; a new step writes the line of the one before."""
        name = record.evaluated(self.split, "", record.LOSS) if tag == EVALUATED else NAMES.get(tag)
        if name is not None:
            if step != self._step:
                self._write()
                self._step = step
            if (step, name) not in self._evaluated:
                self._metrics[name] = float(value)
            if tag == EVALUATED:
                self._evaluated.add((step, name))
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(tag, value, step, *args, **kwargs)

    def _write(self) -> None:
        if self._metrics:
            record.append(self._path, self._step, self._metrics)
            self._metrics = {}

    def flush(self) -> None:
        """Write the line of the present step."""
        self._write()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __getattr__(self, name: str) -> Any:
        """Any other method of a SummaryWriter: TensorBoard's own, or nothing to do."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tensorboard, name, lambda *args, **kwargs: None)
