"""The progress bar of all that takes long here."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str, unit: str = "B") -> tqdm[Any]:
    """A bar on stderr that counts bytes, or what `unit` says; in a log file a line every ten seconds only."""
    mininterval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=what,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        leave=False,
        mininterval=mininterval,
        disable=total == 0,
    )
