"""What a trainer writes to metrics.jsonl, as one line a logged step on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAST_LINE_WIDTH = 160


class MetricsTail:
    """Reads the records that are appended to a metrics file after this object was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def records(self) -> Iterator[dict[str, Any]]:
        """New whole lines since the last call; what a killed process left half-written is passed over."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                step, metrics = int(record["step"]), record["metrics"]
                values = {str(name): float(value) for name, value in metrics.items()}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                continue
            yield {"step": step, "metrics": values}


def last_line(log: Path, start: int) -> str:
    """The last line with a text behind the first `start` bytes of a log, cut to a terminal's width."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, 2) - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip()[:LAST_LINE_WIDTH] for line in reversed(lines) if line.strip()), "")


def format_record(record: dict[str, Any], total_steps: int | None) -> str | None:
    """`step  20/400  loss 6.512  …`, or None for a record that holds nothing to follow a run by."""
    metrics = record["metrics"]
    step = record["step"]
    fields = []
    if "train/loss" in metrics:
        fields.append(f"loss {metrics['train/loss']:.4f}")
    if "train/grad_norm" in metrics:
        fields.append(f"grad norm {metrics['train/grad_norm']:.2f}")
    if "train/learning_rate" in metrics:
        fields.append(f"lr {metrics['train/learning_rate']:.2e}")
    seconds = metrics.get("train/step_seconds")
    if seconds is not None:
        fields.append(f"{seconds:.2f} s/step")
    for name, value in metrics.items():
        kind, *label = name.split("/")
        if kind == "valid" and label[-1:] == ["loss"]:
            of = f" {'/'.join(label[:-1])}" if label[:-1] else ""
            fields.append(f"validation{of} loss {value:.4f} (perplexity {math.exp(min(value, 20)):.1f})")
        elif kind == "eval":
            fields.append(f"{'/'.join(label)} {value:.4f}")
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
