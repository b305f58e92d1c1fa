"""The processor by its name: what measured times are of."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """As Linux names it; elsewhere, or where it does not, the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
