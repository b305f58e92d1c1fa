"""What a trainer writes to metrics.jsonl, as one line a logged step on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from polycom_ext.runs import record

LAST_LINE_WIDTH = 160


class MetricsTail:
    """Reads the records that are appended to a metrics file after this object was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def records(self) -> Iterator[tuple[int, dict[str, float]]]:
        """New whole lines since the last call; what a killed process left half-written is passed over."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        yield from filter(None, map(record.parse, whole.splitlines()))


def last_line(log: Path, start: int) -> str:
    """The last line with a text behind the first `start` bytes of a log, cut to a terminal's width."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, 2) - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip()[:LAST_LINE_WIDTH] for line in reversed(lines) if line.strip()), "")


def format_line(step: int, metrics: dict[str, float], total_steps: int | None) -> str | None:
    """`step  20/400  loss 6.512  …`, or None for values by which nobody follows a run."""
    fields = []
    if record.TRAIN_LOSS in metrics:
        fields.append(f"loss {metrics[record.TRAIN_LOSS]:.4f}")
    if record.GRAD_NORM in metrics:
        fields.append(f"grad norm {metrics[record.GRAD_NORM]:.2f}")
    if record.LEARNING_RATE in metrics:
        fields.append(f"lr {metrics[record.LEARNING_RATE]:.2e}")
    seconds = metrics.get(record.STEP_SECONDS)
    if seconds is not None:
        fields.append(f"{seconds:.2f} s/step")
    if record.MFU in metrics:
        fields.append(f"MFU {metrics[record.MFU]:.1%}")
    for name, value in metrics.items():
        text = record.label_of(name, record.VALID, record.LOSS)
        if text is not None:
            of = f" {text}" if text else ""
            fields.append(f"validation{of} loss {value:.4f} (perplexity {math.exp(min(value, 20)):.1f})")
        elif name.startswith(f"{record.EVAL}/"):
            fields.append(f"{name.partition('/')[2]} {value:.4f}")
    if not fields:
        return None
    if seconds is not None and math.isfinite(seconds) and total_steps is not None and total_steps > step:
        fields.append(f"{duration(seconds * (total_steps - step))} left")
    of = "" if total_steps is None else f"/{total_steps}"
    return f"step {step:{len(of) or 1}}{of}  " + "  ".join(fields)


def duration(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
