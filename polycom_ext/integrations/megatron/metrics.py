"""What Megatron writes to TensorBoard, kept in a run's metrics.jsonl as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polycom_ext.runs import record
from polycom_ext.runs.efficiency import Efficiency

NAMES = {
    "lm loss": record.TRAIN_LOSS,
    "grad-norm": record.GRAD_NORM,
    "learning-rate": record.LEARNING_RATE,
    "iteration-time": record.STEP_SECONDS,
    "load_balancing_loss": record.LOAD_BALANCING_LOSS,
    "z_loss": record.Z_LOSS,
}
"""Megatron's tag -> the record's name."""
BATCH = "batch-size"
"""Megatron's tag of the sequences in this step's batch, which may grow in training."""
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
        self._efficiency: Efficiency | None = None
        self._sequence = self._batch = 0

    def measure(self, efficiency: Efficiency, sequence: int) -> None:
        """Reckon tokens a second, of sequences of so many, from upstream's times of steps from now on."""
        self._efficiency, self._sequence = efficiency, sequence

    def begin_after(self, step: int) -> None:
        """Take evaluations of later steps anew: training goes on from this one's checkpoint, or from 0."""
        self._evaluated = {(at, name) for at, name in self._evaluated if at <= step}

    def add_memory(self, peak: float) -> None:
        """Add to the present step what the device has held at most."""
        self._metrics[record.PEAK_MEMORY] = peak

    def add_scalar(self, tag: str, value: Any, step: int, *args: Any, **kwargs: Any) -> None:
        """Collect one value; a new step writes the line of the one before."""
        if tag == BATCH:
            self._batch = int(value)
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
        seconds = self._metrics.get(record.STEP_SECONDS)
        if self._efficiency is not None and self._batch and seconds:
            self._metrics |= self._efficiency.metrics(self._batch * self._sequence / seconds)
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
