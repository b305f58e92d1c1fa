"""How a rehearsal is smaller than its run: the arithmetic that all trainers' rooms share."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

STEPS = 20
"""Of a rehearsal."""
INTERVAL = 10
"""Steps between two evaluations, or two checkpoints: each happens twice."""
HEAD = 16
"""Hidden width a head, at least, and what larger ones are multiples of."""
SEQUENCE = 64
"""Tokens."""
MICRO_BATCH = 2
"""Sequences, at most."""
THINNER = 8
"""One layer is left of so many."""


def positive(value: Any) -> int | None:
    """A number of a spec that there is something to take from; None for whatever else stands there."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def heads(count: int, groups: int, divisor: int = 1) -> tuple[int, int]:
    """Fewer attention heads, and groups of them that share keys: as many heads a group as before.

    Four heads or more, in two groups or more, where there were so many.

    Args:
        divisor: processes that share them; it goes on to divide both, where it did.
    """
    common = math.gcd(count, groups)
    for part in (part for part in range(common, 1, -1) if common % part == 0):
        new = count // part, groups // part
        divides = all(
            was % divisor or not now % divisor for was, now in zip((count, groups), new, strict=True)
        )
        if divides and new[0] >= min(count, 4) and new[1] >= min(groups, 2):
            return new
    return count, groups


def widths(hidden: int, ffn: int, count: int, fewer: int, unit: int) -> tuple[int, int]:
    """Hidden width and FFN width: HEAD a head, in the proportion of before.

    They are wider where only so the proportion is exact; where it never is, the FFN's is the multiple that
    comes nearest.

    Args:
        count, fewer: heads before, and now.
        unit: what the FFN's width has to be a multiple of.
    """
    ratio = Fraction(ffn, hidden)
    per_head = max(1, hidden // count)
    narrow = min(HEAD, per_head)
    for width in range(narrow, per_head + 1, HEAD):
        wanted = fewer * width * ratio
        if wanted % unit == 0:
            return fewer * width, int(wanted)
    return fewer * narrow, nearest(fewer * narrow * ratio, unit)


def nearest(wanted: Fraction | float, unit: int) -> int:
    """The multiple of `unit` that comes nearest, at least one."""
    return max(1, round(wanted / unit)) * unit


def layers(count: int, unit: int = 1) -> int:
    """One of THINNER, and two at least: a deeper model stays the deeper one.

    Args:
        unit: what the layers have to be a multiple of: stages of a pipeline.
    """
    wanted = max(min(count, 2), math.ceil(count / THINNER))
    return math.ceil(wanted / unit) * unit


def experts(count: int, chosen: int, divisor: int = 1) -> tuple[int, int]:
    """Fewer experts, and how many a token meets: the same share of them, and still several where it was.

    Args:
        divisor: processes that share the experts.
    """
    common = math.gcd(count, chosen)
    for part in (part for part in range(common, 1, -1) if common % part == 0):
        if chosen // part >= min(chosen, 2) and count // part % divisor == 0:
            return count // part, chosen // part
    return count, chosen


def replicas(count: int, divides: Callable[[int], bool] = lambda number: True) -> int:
    """The fewest copies of the model that the layout allows, and two where there are several.

    One alone sums no gradients and shards no optimizer: it would be another program.
    """
    fewest = min(count, 2)
    return next((number for number in range(fewest, count) if divides(number)), count)


def batch(micro: int, accumulated: int, least: int = 1) -> tuple[int, int]:
    """Sequences of a micro-batch, and how many of these a step adds up.

    Args:
        least: micro-batches that a pipeline wants.
    """
    return min(micro, MICRO_BATCH), min(accumulated, max(2, least))


def sequence(length: int, unit: int = 1) -> int:
    """Tokens of a sequence, a multiple of `unit`."""
    return min(length, math.ceil(SEQUENCE / unit) * unit)


def share(part: float, whole: float, new: int) -> int:
    """Of `new` what `part` was of `whole`, to the nearest; at least one where it was anything."""
    return max(1, round(part / whole * new)) if part > 0 else 0
