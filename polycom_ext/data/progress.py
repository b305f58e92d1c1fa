"""The progress bar of everything that reads files here."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, what: str) -> tqdm[Any]:
    """A bar that counts bytes on stderr; in a log file it writes a line every ten seconds only."""
    mininterval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=mininterval,
        disable=total == 0,
    )
