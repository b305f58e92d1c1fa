"""`polycom status RUN…`: how runs stand, once or until all of them have ended."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from polycom_ext.display import printable
from polycom_ext.runs import progress
from polycom_ext.runs.record import Record
from polycom_ext.runs.status import RUNNING, Status, read

WATCH_SECONDS = 2.0
"""Between two looks."""
AT_ONCE = 16
"""Runs that are looked at."""
WIDTH = 100
"""Columns of the table; names are cut to fit."""
LEAST_NAME = 10
CLEAR = "\x1b[H\x1b[J"
"""A terminal's cursor to its corner, and what is below it away."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or a folder of such directories"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects, times in seconds")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show what is new until all have ended (Ctrl-C: status 130)",
    )
    parser.set_defaults(only_prints=True)


def main(args: argparse.Namespace) -> int:
    """Print how the runs stand; 0 however that is."""
    terminal = args.watch and sys.stdout.isatty()
    shown: list[tuple[str, int | None, int | None]] | None = None
    while True:
        found = _read(_run_dirs(args.runs))
        news = [(status.state, status.step, status.checkpoint_step) for status in found]
        if terminal or news != shown:
            text = _as_json(found) if args.json else _as_text(found)
            print(f"{CLEAR if terminal else ''}{text}", flush=True)
            shown = news
        if not args.watch or not any(status.is_going_on for status in found):
            return 0
        time.sleep(WATCH_SECONDS)


def _read(paths: Sequence[Path]) -> list[Status]:
    """All at once: job systems that do not answer keep one another waiting no longer than one does."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(read, paths))


def _run_dirs(given: Sequence[Path]) -> list[Path]:
    """The directories themselves, or those in a folder that is none; each once."""
    found: dict[Path, None] = {}
    for path in given:
        inside = [] if Record(path).spec.is_file() or not path.is_dir() else sorted(path.iterdir())
        runs = [below for below in inside if Record(below).spec.is_file()]
        found |= dict.fromkeys(runs or [path])
    return list(found)


def _as_json(found: Sequence[Status]) -> str:
    """JSON has no numbers that are none: a loss may be "nan" or "inf"."""
    objects = [
        {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(status).items()
        }
        for status in found
    ]
    return json.dumps(objects, indent=2)


def _as_text(found: Sequence[Status]) -> str:
    return _block(found[0]) if len(found) == 1 else _table(found)


def _block(status: Status) -> str:
    """One run, a line a fact."""
    tokens = None if status.tokens is None else f"{_count(status.tokens)} tokens"
    speed = [
        None if status.step_seconds is None else f"{status.step_seconds:.2f} s/step",
        None if status.tokens_per_second is None else f"{_count(status.tokens_per_second)} tokens/s",
        None if status.seconds_left is None else f"{progress.duration(status.seconds_left)} left",
    ]
    mfu = status.mfu_of
    if status.mfu is not None:
        mfu = f"MFU {status.mfu:.1%} {mfu}"
    peak = status.peak_memory_bytes
    memory = None if peak is None else f"{peak / 1024**3:.3g} GiB of memory at most"
    age = status.checkpoint_age_seconds
    checkpoint = None if status.checkpoint_step is None else f"step {status.checkpoint_step}"
    losses = [
        None if status.loss is None else f"{status.loss:.4f}",
        None if status.validation_loss is None else f"validation {status.validation_loss:.4f}",
    ]
    facts = {
        "state": ": ".join(filter(None, (status.state, status.reason))),
        "since": status.since and _local(status.since),
        "step": ", ".join(filter(None, (_step(status), tokens))),
        "speed": ", ".join(filter(None, speed)),
        "use": ", ".join(filter(None, (mfu, memory))),
        "loss": ", ".join(filter(None, losses)),
        "checkpoint": ", ".join(filter(None, (checkpoint, None if age is None else f"{_span(age)} old"))),
        "attempts": str(status.attempts),
        "in": status.path,
        "note": status.untold,
    }
    lines = [f"  {name:12}{printable(value)}" for name, value in facts.items() if value]
    return "\n".join([printable(status.run), *lines])


def _table(found: Sequence[Status]) -> str:
    """A row a run, and below it what else there is to say of some."""
    head = ("run", "state", "for", "step", "tokens", "tok/s", "loss", "valid", "left", "saved", "try")
    rows = [head, *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    widths[0] = min(widths[0], max(LEAST_NAME, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines = []
    for row in rows:
        name, state, *cells = row
        name = name if len(name) <= widths[0] else f"…{name[1 - widths[0] :]}"
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), state.ljust(widths[1]), *aligned]).rstrip())
    for status in found:
        for note in filter(None, (status.reason and f"{status.state}: {status.reason}", status.untold)):
            lines.append(printable(f"{status.path}: {note}"))
    return "\n".join(lines)


def _row(status: Status) -> tuple[str, ...]:
    since = None if status.since is None else time.time() - datetime.fromisoformat(status.since).timestamp()
    age = status.checkpoint_age_seconds
    saved = "-" if status.checkpoint_step is None else _count(status.checkpoint_step)
    return (
        printable(Path(status.path).name or status.path),
        status.state,
        "-" if since is None else _span(since),
        _step(status) or "-",
        "-" if status.tokens is None else _count(status.tokens),
        "-" if status.tokens_per_second is None else _count(status.tokens_per_second),
        _loss(status.loss),
        _loss(status.validation_loss),
        "-" if status.seconds_left is None else _left(status.seconds_left),
        saved + ("" if age is None or status.state != RUNNING else f" {_span(age)}"),
        str(status.attempts),
    )


def _step(status: Status) -> str:
    of = "" if status.total_steps is None else f"/{_count(status.total_steps)}"
    return "" if status.step is None else f"{_count(status.step)}{of}"


def _count(number: float) -> str:
    """At most seven characters: `999999`, `1.05M`, `12.3G`."""
    if number < 1e6:
        return f"{number:.0f}"
    number /= 1000
    for unit in "MGTP":
        number /= 1000
        if number < 999.5:
            return f"{number:.3g}{unit}"
    return f"{number / 1000:.3g}E"


def _loss(value: float | None) -> str:
    """At most six characters."""
    if value is None:
        return "-"
    return f"{value:.3f}" if not math.isfinite(value) or abs(value) < 99 else f"{value:.0e}".replace("+", "")


def _left(seconds: float) -> str:
    return progress.duration(seconds) if seconds < 360_000 else _span(seconds)


def _span(seconds: float) -> str:
    """`45s`, `12m`, `3h`, `2d`, `1y`."""
    for unit, length in (("y", 31_557_600), ("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def _local(when: str) -> str:
    return datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M:%S")
