"""What doctor says of a thing: one line, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from polycom_ext.display import printable


class Mark(Enum):
    """How it stands with a thing."""

    OK = "ok"
    MISSING = "missing"
    WRONG = "wrong"
    UNNEEDED = "not needed here"


@dataclass(frozen=True)
class Finding:
    """One thing."""

    subject: str
    mark: Mark
    text: str
    way_out: str = ""
    stops: bool = False
    """What was asked about cannot be done: to run this package or, with a spec, that run."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "mark": self.mark.value}


def shown(findings: Iterable[Finding]) -> str:
    """A line each, the way out below it."""
    lines = []
    for one in findings:
        lines.append(f"{one.mark.value:15}  {one.subject:22}  {one.text}")
        if one.way_out:
            lines.append(f"{'':15}  {'':22}  -> {one.way_out}")
    return "\n".join(printable(line) for line in lines)
