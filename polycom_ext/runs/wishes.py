"""What a site asks of the nodes of a run before it starts: `preflight:` of a site file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from polycom_ext.errors import PolycomError, did_you_mean

CHECKS = ("package", "spec", "trees", "versions", "gpus", "health", "idle", "disk", "data", "clock")
"""What `off` may name."""
GB = 10**9
UNITS = {"K": 10**3, "M": 10**6, "G": GB, "T": 10**12}


@dataclass(frozen=True)
class Wishes:
    """The keys of `preflight:`, all of which may be left out."""

    off: tuple[str, ...] = ()
    """Checks that are not made."""
    disk: int = GB
    """Bytes that are to be free where the run directory is; as `50G`, too."""
    clock: float = 5.0
    """Seconds by which the clocks of two nodes may differ."""
    bandwidth: float | None = None
    """GB/s (10^9 bytes) that an all-reduce over all processes is to reach; not measured without it."""
    wait: float = 600.0
    """Seconds in which all nodes are to appear."""
    silence: float = 30.0
    """Seconds after which a node from which nothing was heard is taken for lost."""

    def wants(self, check: str) -> bool:
        """Whether one of CHECKS is to be made."""
        return check not in self.off

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], origin: str) -> Wishes:
        """Raises PolycomError, which begins with `origin`, for an unknown key or a value of a wrong kind."""
        known = [one.name for one in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in mapping.items():
            if key not in known:
                near = did_you_mean(str(key), known)
                raise PolycomError(
                    f"{origin}: preflight: unknown key {key!r}{near}; known: {', '.join(known)}"
                )
            values[key] = _CONVERTERS.get(key, _seconds)(value, f"{origin}: preflight.{key}")
        return cls(**values)


def _checks(value: Any, origin: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in CHECKS:
            near = did_you_mean(str(name), CHECKS)
            raise PolycomError(f"{origin}: no check {name!r}{near}; known: {', '.join(CHECKS)}")
    return tuple(names)


def _bytes(value: Any, origin: str) -> int:
    text = str(value)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text)
    if isinstance(value, bool) or match is None:
        raise PolycomError(f"{origin} must be a number of bytes, as in 50G, not {value!r}")
    return int(float(match[1]) * UNITS.get(match[2], 1))


def _seconds(value: Any, origin: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise PolycomError(f"{origin} must be a number above 0, not {value!r}")
    return float(value)


_CONVERTERS = {"off": _checks, "disk": _bytes}
